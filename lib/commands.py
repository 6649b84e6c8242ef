"""What every command does around its `main`: devices, and errors in one line."""

from collections.abc import Callable
from typing import Any

from lib import hosts, runs
from lib.hosts import DeviceOptions
from lib.settings import settings_of


def run_command(main: Callable[[Any], Any], parse: Callable[[], Any], *, lower: str = "") -> None:
    """`main(parse())` on the devices that the arguments, which extend `lib.hosts.DeviceOptions`,
    ask for; errors as `lib.runs.one_line_errors` has them, `lower` what memory depends on."""
    with runs.one_line_errors(lower=lower):
        arguments = parse()
        with hosts.started(settings_of(DeviceOptions, arguments)):
            main(arguments)
