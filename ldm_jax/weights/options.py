"""The options of a published config, none of which is silently ignored: used, or without effect at its value, or refused."""
from typing import Any, Callable, Dict, Iterable, Mapping, Tuple, Union

from ldm_jax.types import UserError

BOOKKEEPING = {"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values"}


def options(config: Mapping[str, Any], defaults: Mapping[str, Any], only: Mapping[str, Union[Tuple, Callable]] = {},
            without_effect: Iterable[str] = ()) -> Dict[str, Any]:
    """A config.json with the reference's defaults for what it leaves out; lists are tuples.

    Args:
      defaults: of every option that is used.
      only: option -> the values that are supported, or a function that says whether a value is.
      without_effect: options that change nothing whatever their value is.

    Raises:
      UserError: for unknown options and unsupported values, all of them by name and value.
    """
    known = set(defaults) | set(only) | set(without_effect) | BOOKKEEPING
    wrong = [f"{key}={config[key]!r}" for key in sorted(set(config) - known)]
    said = {**defaults, **{key: tuples(value) for key, value in config.items() if key in defaults}}
    for key, allowed in only.items():
        value = tuples(config[key]) if key in config else said.get(key, allowed[0] if isinstance(allowed, tuple) else None)
        if not (value in allowed if isinstance(allowed, tuple) else allowed(value)):
            choices = f" (supported: {', '.join(repr(a) for a in allowed)})" if isinstance(allowed, tuple) else ""
            wrong.append(f"{key}={value!r}{choices}")
    refuse(config, wrong)
    return said


def refuse(config: Mapping[str, Any], wrong: Iterable[str]) -> None:
    """Raises UserError when there is anything in `wrong`, texts that name an option and its value."""
    if wrong := list(wrong):
        raise UserError(f"the config of this {config.get('_class_name', 'net')} has options that are not supported: "
                        f"{', '.join(wrong)}; load a checkpoint without them")


def tuples(value: Any) -> Any:
    """Lists, also nested ones, as tuples."""
    return tuple(tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def per_level(value: Any, n: int, name: str, config: Mapping[str, Any]) -> Tuple:
    """One value for each of n levels, where `value` is one for all or a list."""
    if not isinstance(value, tuple):
        return (value,) * n
    if len(value) != n:
        refuse(config, [f"{name}={value!r} for {n} levels"])
    return value


def sides(size: Any, default: int, multiple: int = 1) -> Tuple[int, int]:
    """(H, W) of a sample_size: a number, a pair or None; rounded up to a multiple."""
    pair = size if isinstance(size, tuple) else (default if size is None else size,) * 2
    return tuple(-(-int(n) // multiple) * multiple for n in pair)
