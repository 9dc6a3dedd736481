"""The script of a job, from a template that reads like the script."""

from __future__ import annotations

import shlex
from pathlib import Path

import jinja2

from gptoss_dist.cluster.job import Job

TEMPLATE = "job.sbatch.j2"


def render(job: Job) -> str:
    """Return the batch script of a job. Every word that a person gave is quoted for the shell."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is no HTML
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template(TEMPLATE).render(job=job, options=job.options, site=job.site)
