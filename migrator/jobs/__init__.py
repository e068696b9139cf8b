"""Declared migrations: job files read, run, resumed and watched for. Nothing here prints."""

from __future__ import annotations

from migrator.jobs.batch import foresee_files, run_files, watch
from migrator.jobs.job import Job, Step
from migrator.jobs.reading import job_files, read
from migrator.jobs.results import Event, Forecast, JobResult, Listener, StepForecast, StepResult
from migrator.jobs.running import foresee, run
from migrator.settings import Check, Prove, Reshard, Rewrite, Validate, Verify

__all__ = [
    "Check",
    "Event",
    "Forecast",
    "Job",
    "JobResult",
    "Listener",
    "Prove",
    "Reshard",
    "Rewrite",
    "Step",
    "StepForecast",
    "StepResult",
    "Validate",
    "Verify",
    "foresee",
    "foresee_files",
    "job_files",
    "read",
    "run",
    "run_files",
    "watch",
]
