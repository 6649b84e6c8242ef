"""A grid of commands, run by submitit here or on Slurm; those that are finished are skipped.

    python -m lib.runs.sweeps --grid seed=0,1,2 lr=1,5 -- \\
        xp_dataset_distillation/condense.py echo --dataset digits --seed {seed} --lr {lr}
    python -m lib.runs.sweeps --grid ... --slurm time=120 gpus=1 partition=long --detach -- ...

The same sweep again runs what is missing. What it keeps of a command is in `lib/runs/_workers.py`.
"""

import contextlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from lib import datasets, runs
from lib.rows.files import open_rows
from lib.runs import _workers, console


@dataclass(frozen=True)
class Arguments:
    grid: tuple[str, ...] = ()
    """NAME=VALUE,VALUE,...: {NAME} in the command becomes each value."""
    workers: int | None = None
    """How many run at once. None: 1 here, which has the machine to itself; 256 on Slurm."""
    slurm: tuple[str, ...] | None = None
    """NAME=VALUE of sbatch's long options, time (in minutes) among them: run on Slurm."""
    detach: bool = False
    """With --slurm: submit and leave."""
    dry_run: bool = False
    """Print the commands and which are finished."""
    results: Path = Path("results")
    """The folder of the commands' states, from the repository's root as in the commands."""


def known_by(command: _workers.Command) -> _workers.Command:
    """The command with the content of data in place of the paths that lead to them, so that other
    data there make another command; as it is where it names no data of the user's own."""
    words = [
        part
        for word in command
        for part in (word.split("=", 1) if word.startswith("--") else [word])
    ]
    data_root = dict(itertools.pairwise(words)).get("--data_root")
    known, option = [], ""
    with contextlib.chdir(_workers.ROOT):  # where the command looks for them
        for word in words:
            if is_option := word.startswith("--"):
                option = word.replace("-", "_").strip("_")
            known.append(word if is_option else _content(option, word, data_root))
    return command if known == words else tuple(known)


def _content(option: str, word: str, data_root: str | None) -> str:
    """What stands for a value of an option."""
    with contextlib.suppress(OSError, ValueError):  # the command says what is wrong with it
        if option.endswith("dataset"):
            return datasets.identity(word, data_root=data_root)
        if option in ("train_paths", "val_paths"):
            return f"{runs.CONTENT}{open_rows(word).fingerprint()}"
    return word


def main(arguments: Arguments, template: list[str]) -> int:
    """Runs the sweep; returns the exit status, 1 unless all is finished, 130 after a stop."""
    if template[:1] == ["python"]:
        template = template[1:]
    if not template:
        raise ValueError("give the command after --: --grid seed=0,1 -- FILE --seed {seed}")
    slurm = None if arguments.slurm is None else _workers.slurm_options(arguments.slurm)
    if arguments.detach and slurm is None:
        raise ValueError("--detach is for --slurm")
    workers = arguments.workers
    if workers is None:
        workers = 256 if slurm else 1
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folder = (_workers.ROOT / arguments.results / "sweeps").resolve()
    entries = [
        _workers.Entry(command, folder / runs.config_hash({"command": known_by(command)}))
        for command in _workers.expand(template, arguments.grid)
    ]
    missing = [entry for entry in entries if not entry.done.exists()]
    print(f"{len(entries) - len(missing)} of {len(entries)} finished already", flush=True)
    if arguments.dry_run:
        for entry in entries:
            print(f"{'to run  ' if entry in missing else 'finished'}  {entry}")
        return 0
    if arguments.detach:
        if missing:
            _workers.submit(missing, slurm, workers=workers, gpus={})
        return 0
    with console.interruptible() as stop_requested:
        outcomes = _workers.run(missing, slurm, workers=workers, stop_requested=stop_requested)
        missing = [entry for entry in missing if outcomes.get(entry) != "finished"]
        print(f"{len(entries) - len(missing)} of {len(entries)} finished")
        for entry in missing:
            print(f"  {entry}\n    {outcomes.get(entry, 'not started')}")
            if entry in outcomes:
                print(f"    {entry.log}: {_workers.last_line(entry.log)}")
        if missing:
            print("the same sweep again runs what is missing")
        if stop_requested():
            sys.exit(console.STATUS_OF_A_STOP)  # here, where the request is answered
    return 1 if missing else 0


if __name__ == "__main__":
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    try:
        with console.one_line_errors():
            sys.exit(main(tyro.cli(Arguments, args=sys.argv[1:at]), sys.argv[at + 1 :]))
    except KeyboardInterrupt:  # the second of them
        print("left at once: what was started saves and ends on its own", file=sys.stderr)
        sys.exit(console.STATUS_OF_A_STOP)
