"""Jobs for SLURM: what a site wants, the script of a job, what is kept of it, and its submission."""

from gptoss_dist.cluster.job import Job, JobOptions, Site, split_arguments
from gptoss_dist.cluster.kept import Revision, check_submittable, keep, next_folder, read_revision
from gptoss_dist.cluster.mounts import check_mounts, missing_data
from gptoss_dist.cluster.render import render
from gptoss_dist.cluster.submit import follow, submit
from gptoss_dist.cluster.sweep import sweep

__all__ = [
    "Job",
    "JobOptions",
    "Revision",
    "Site",
    "check_mounts",
    "check_submittable",
    "follow",
    "keep",
    "missing_data",
    "next_folder",
    "read_revision",
    "render",
    "split_arguments",
    "submit",
    "sweep",
]
