"""Item `gpu-tests`: the tests marked `gpu`, each reported when it has ended."""

import time
from pathlib import Path

import pytest
import torch

from launch.benchmarks.prove_gpu.findings import ROOT, Findings, run_item


class Reporter:
    """A plugin of pytest that says what becomes of each test."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.reasons: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":  # set up or torn down
            return
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.findings.check(report.nodeid, False, report.longreprtext.strip().splitlines()[-1][:300])
        elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            self.reasons.add(report.longrepr[2])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self.findings.check(report.nodeid, False, report.longreprtext.strip().splitlines()[-1][:300])


def gpu_tests(findings: Findings, work: Path) -> None:
    # Collecting the whole suite takes longer than these tests do.
    files = sorted(str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    reporter, begin = Reporter(findings), time.perf_counter()
    code = pytest.main(["-m", "gpu", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files], plugins=[reporter])
    for outcome, count in reporter.counts.items():
        findings.figure(outcome, count, "tests")
    if reporter.reasons:
        findings.text("why tests were skipped", "\n".join(sorted(reporter.reasons)))
    findings.figure("pytest", time.perf_counter() - begin, "s", "collection included")
    if torch.cuda.is_available():
        findings.check(
            "tests ran, and none failed", code == 0 and reporter.counts["passed"] > 0, f"pytest ended with {code}"
        )
    else:
        skipped = reporter.counts["skipped"] > 0 and not reporter.counts["passed"]
        findings.check("without CUDA all are skipped", code == 0 and skipped, f"pytest ended with {code}")


if __name__ == "__main__":
    run_item({"gpu-tests": gpu_tests}, __doc__)
