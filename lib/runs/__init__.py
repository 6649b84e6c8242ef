"""Runs: folders, files, interruption, commands."""

from lib.runs._folders import (
    CONTENT,
    NOT_HASHED,
    Run,
    config_hash,
    environment,
    open_run,
    provenance,
)
from lib.runs._programs import keep_compiled_programs
