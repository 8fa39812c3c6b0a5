"""What was measured: rows, a table for people, and JSON with device, versions and commit."""
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from typing import Any, Dict, List, Optional, Sequence, Tuple

import jax

VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch", "diffusers")


@dataclasses.dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
      suite, net, what: of which part, which network, and what it is.
      value, unit: the median.
      low, high: the smallest and largest of several.
      peer: name of the peer, its value in the same unit.
      ratio: (median, smallest, largest) over pairs; above 1 we are the faster.
      detail: further facts, such as the batch's size or the FLOPs.
    """
    suite: str
    net: str
    what: str
    value: float
    unit: str
    low: Optional[float] = None
    high: Optional[float] = None
    peer: Optional[Tuple[str, float]] = None
    ratio: Optional[Tuple[float, float, float]] = None
    detail: Dict[str, Any] = dataclasses.field(default_factory=dict)


def figure(value: float) -> str:
    """Three digits, thousands with a comma."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| suite | network | what | figure | peer | ratio (of pairs) |", "|---|---|---|---|---|---|"]
    for row in rows:
        peer = f"{row.peer[0]}: {figure(row.peer[1])}" if row.peer else ""
        ratio = f"{row.ratio[0]:.2f} ({row.ratio[1]:.2f} to {row.ratio[2]:.2f})" if row.ratio else ""
        spread = f" ({figure(row.low)} to {figure(row.high)})" if row.low is not None else ""
        lines.append(f"| {row.suite} | {row.net} | {row.what} | {figure(row.value)} {row.unit}{spread} | {peer} | {ratio} |")
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, where the system says it, with its family and model and whether it has AVX-512: virtual machines of one
    name differ by a factor of two in what their matrix products reach."""
    try:
        with open("/proc/cpuinfo") as f:
            said = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", f.read(), re.M))
    except OSError:
        said = {}
    name = said.get("model name") or platform.processor() or platform.machine()
    kind = [f"family {said['cpu family']} model {said['model']}"] if {"cpu family", "model"} <= said.keys() else []
    kind += ["AVX-512"] if "avx512f" in said.get("flags", "").split() else []
    return f"{name} ({', '.join(kind)})" if kind else name


def machine() -> str:
    """The device that was measured, in words."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    return f"{os.cpu_count()} cores of {processor()}"


def facts() -> Dict[str, Any]:
    """When, on what and with what: date, device, versions, commit."""
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "device": machine(),
            "system": platform.platform(), "versions": versions, "commit": commit()}


def commit() -> Optional[str]:
    """The checkout's commit, with "+" where files differ from it; None outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: str, rows: List[Row], about: Dict[str, Any], command: Sequence[str]) -> None:
    """All of it as JSON at `path`, whose directory is made."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as f:
        json.dump({**about, "command": list(command), "rows": [dataclasses.asdict(row) for row in rows]}, f, indent=1)
        f.write("\n")
