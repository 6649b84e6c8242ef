"""Runs: folders, files, interruption, commands.

A run has a folder named after the hash of its settings. It is skipped when it is finished, resumes
to the same bits when it was interrupted, and is locked while a process works in it. `loop` drives
long compiled loops, `files` writes whole files or none, `sweeps` runs grids of commands.
"""

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
