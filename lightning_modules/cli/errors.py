"""Errors of the command lines: bad input ends with one line on stderr and exit code 2.

All other errors keep their traceback and exit code 1.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from transformers.utils import logging as transformers_logging

from acckv.errors import InputError
from lightning_modules.interrupted import was_interrupted

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143
CONFIG_OPTIONS = ("--config", "-c")
#: Folders that a config is looked for in by its name alone, after the current one: those of the checkout or the wheel.
CONFIG_FOLDERS = (Path("configs"), *(folder / "configs" for folder in Path(__file__).resolve().parents[1:3]))
_LONGEST = 400  # characters of a line; some type errors list every type that was tried


def run_cli(main: Callable[[], Any]) -> int:
    """Run a command line and return its exit code: 0, or 2 after printing one `error:` line for bad input.

    A run that Ctrl-C stopped ends with 130, one that was sent SIGTERM with 143. `SystemExit` (of `--help` and
    `--print_config`) passes through.
    """
    try:
        sys.argv[1:] = with_found_configs(sys.argv[1:])
        main()
    except InputError as error:
        print(f"error: {one_line(_located(error, sys.argv[1:]))}", file=sys.stderr)
        return BAD_INPUT
    except MisconfigurationException as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except SIGTERMException:
        return TERMINATED
    except (KeyboardInterrupt, SystemExit) as error:
        if not was_interrupted(error):
            raise
        return INTERRUPTED
    return 0


def with_found_configs(argv: Sequence[str]) -> list[str]:
    """Command-line words in which a config that is a bare file name, and not in this folder, is that of `configs/`.

    Raises:
        InputError: there is none of this name in either folder.
    """
    words = list(argv)
    for index, given in option_values(argv, *CONFIG_OPTIONS):
        if Path(given).name != given or Path(given).suffix not in (".yaml", ".yml", ".json") or Path(given).exists():
            continue
        found = next((folder / given for folder in CONFIG_FOLDERS if (folder / given).is_file()), None)
        if found is None:
            raise InputError("is neither in this folder nor in configs/", source=given, field="config")
        words[index] = words[index].removesuffix(given) + str(found)
    return words


def quiet_libraries() -> None:
    """Keep libraries' notes (devices, workers, weights loaded) off the terminal; other warnings stay."""
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    known_notes = (
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*deprecated.*",
        ".*is_gradient_checkpointing.*",
    )
    for known in known_notes:
        warnings.filterwarnings("ignore", message=known)


def one_line(message: str) -> str:
    """A message without line breaks. An error that crossed a data-loader process is reduced to its last line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if len(lines) > 1 and any("Traceback (most recent call last)" in line for line in lines):
        lines = [lines[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")]
    text = re.sub(r"\s+", " ", " ".join(lines))
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def _located(error: InputError, argv: Sequence[str]) -> str:
    """The message of an error, with the config file that its field was set in where the error names no file."""
    if error.source is not None or error.field is None:
        return str(error)
    if any(re.match(rf"--([\w.]+\.)?{re.escape(error.field)}(=|$)", word) for word in argv):
        return str(error)
    file = _file_with(error.field, _config_files(argv))
    return str(error) if file is None else f"{file}: {error}"


@contextmanager
def parser_errors(parser: ArgumentParser) -> Iterator[None]:
    """Complaints of a parser with `exit_on_error=False`, inside the context, as an `InputError`."""
    try:
        yield
    except ArgumentError as error:
        known = [action.dest for action in parser._actions]
        raise parser_error(str(error), sys.argv[1:], known) from error


def parser_error(message: str, argv: Sequence[str], known: Sequence[str] = ()) -> InputError:
    """The `InputError` for a message of jsonargparse; the config file is named where the key is in it.

    Args:
        known: keys the parser knows, for a suggestion.
    """
    files = _config_files(argv)
    if message.startswith(("Problems parsing config", "Unexpected config")):
        broken = next((file for file in files if not isinstance(_load(file), dict)), None)
        return InputError(f"not a YAML mapping of options ({one_line(message)})", source=broken)
    unknown = re.search(r"Option '([^']+)' is not accepted|does not accept option '([^']+)'", message)
    if unknown:
        group = re.search(r"Group '([^']+)' does not accept", message)
        key = ".".join(part for part in (group and group.group(1), unknown.group(1) or unknown.group(2)) if part)
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return InputError(f"unknown option{hint}", source=_file_with(key, files), field=key)
    typed = re.match(r'Parser key "([^"]+)":?\s*(.*)', message, re.DOTALL)
    if typed:
        key, reason = typed.groups()
        return InputError(_reason(reason), source=_file_with(key, files), field=key)
    return InputError(one_line(message))


def _reason(text: str) -> str:
    """Why a value was refused. Of a union's errors the ones that say more than which type was expected are kept."""
    tried = re.findall(r"^\s*- (.+)$", text, re.MULTILINE)
    telling = [line for line in tried if not line.startswith("Expected a")]
    plain = re.sub(r"<class '([^']+)'>", r"\1", one_line("; ".join(telling) if telling else text))
    return plain.replace("Expected a ", "expected ").rstrip(":")


def given_options(group: str, argv: Sequence[str]) -> set[str]:
    """Names of a group's options that are on the command line, or in a config file that is named there."""
    names = {
        word[len(group) + 3 :].partition("=")[0].partition(".")[0] for word in argv if word.startswith(f"--{group}.")
    }
    for values in (_load(file) for file in _config_files(argv)):
        if isinstance(values, dict):
            inner = [one for one in values.values() if isinstance(one, dict)]  # below the name of a subcommand
            groups = [one.get(group) for one in (values, *inner)]
            names |= {str(name) for one in groups if isinstance(one, dict) for name in one}
    return names


def option_values(argv: Sequence[str], *options: str) -> list[tuple[int, str]]:
    """The values of some options on the command line, each with the place of its word."""
    found = []
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in options and equals:
            found.append((index, value))
        elif name in options and index + 1 < len(argv):
            found.append((index + 1, argv[index + 1]))
    return found


def _config_files(argv: Sequence[str]) -> list[Path]:
    return [Path(file) for _, file in option_values(argv, *CONFIG_OPTIONS)]


def _load(file: Path) -> Any:
    """The parsed file, None if it cannot be read or parsed."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _file_with(key: str, files: Sequence[Path]) -> Path | None:
    """The config file that has the dotted key; its first parts (a subcommand, say) may be missing in the file."""
    parts = key.split(".")
    for file in files:
        values = _load(file)
        if any(_has(values, parts[start:]) for start in range(len(parts))):
            return file
    return None


def _has(values: Any, parts: Sequence[str]) -> bool:
    for part in parts:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True
