"""What a compiled program costs, read off before it runs: operations, bytes per device, and what devices send each other."""
import dataclasses
import math
import re
from typing import Any, Callable, Dict, Iterator, List, Tuple

import jax

_BITS = {"pred": 8, "c64": 64, "c128": 128}


def flops(f: Callable, *args: Any) -> float:
    """Multiplications and additions of the matrix products and convolutions of f(*args), args arrays or ShapeDtypeStructs.

    Loops count as often as they run; one whose length is only known when it runs counts once. What is recomputed in a backward pass
    counts again. Elementwise work is left out.
    """
    return _flops(jax.make_jaxpr(f)(*args).jaxpr)


def _flops(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += 2.0 * math.prod(out.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name == "convolution":  # `models.convolution`
            total += 2.0 * math.prod(out.shape) * math.prod(eqn.invars[1].aval.shape[:-1])
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            # each output is a sum over the kernel's window and its input channels; a gradient's dilation adds zeros, which are not counted
            total += (2.0 * math.prod(out.shape) * math.prod(kernel[i] for i in spec[1:])
                      / math.prod(eqn.params["lhs_dilation"]) / eqn.params["batch_group_count"])
        else:
            inner = [_flops(j) for value in eqn.params.values() for j in _jaxprs(value)]
            total += max(inner, default=0.0) if name == "cond" else sum(inner) * (eqn.params["length"] if name == "scan" else 1)
    return total


def _jaxprs(value: Any) -> Iterator[Any]:
    for v in value if isinstance(value, (tuple, list)) else (value,):
        v = getattr(v, "jaxpr", v)
        if hasattr(v, "eqns"):
            yield v


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device: of the arguments, of what is returned in new memory, and of what is needed in between."""
    arguments: int
    outputs: int
    temporary: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporary


def memory(compiled: Any) -> Memory:
    """XLA's own account of a compiled program; donated arguments are not counted twice."""
    m = compiled.memory_analysis()
    return Memory(m.argument_size_in_bytes, m.output_size_in_bytes - m.alias_size_in_bytes, m.temp_size_in_bytes)


_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(r"=\s+(\([^=]*?\)|\S+)\s+(" + "|".join(_KINDS) + r")(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count\\?":\s*\{\s*\\?"n\\?":\s*\\?"(\d+)')


def collectives(text: str, devices: int) -> Dict[str, Tuple[float, float]]:
    """kind -> (how many, bytes that a device receives) of the collective operations in a compiled program's text (`as_text()`) for
    so many devices.

    Bytes are those of the ring algorithms, for arrays of b bytes among n devices: 2 b (n - 1) / n for a sum that all get, b (n - 1) / n
    to gather b, to scatter a sum of b, or to exchange b, and b to pass b on. Loops of known length count as often as they run.
    """
    bodies, entry = _computations(text)
    total: Dict[str, List[float]] = {}

    def walk(name: str, times: float) -> None:
        for line in bodies.get(name, ()):
            found = _OPERATION.search(line)
            if found:
                shape, kind, start = found.groups()
                n, size = _group(line, devices), _bytes(shape, kind if start else "")
                moved = {"all-reduce": 2 * size * (n - 1) / n, "reduce-scatter": size * (n - 1),
                         "collective-permute": size}.get(kind, size * (n - 1) / n)
                if n > 1 or kind == "collective-permute":
                    entry = total.setdefault(kind, [0.0, 0.0])
                    entry[0], entry[1] = entry[0] + times, entry[1] + times * moved
                continue
            trips = _TRIPS.search(line)
            for one, several in _CALLED.findall(line):
                for called in [one] if one else re.findall(r"[\w.\-]+", several):
                    walk(called, times * (int(trips.group(1)) if trips and " while(" in line else 1))

    walk(entry, 1.0)
    return {kind: (count, size) for kind, (count, size) in sorted(total.items())}


def _computations(text: str) -> Tuple[Dict[str, List[str]], str]:
    bodies, entry, current = {}, "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$", line)
        if head and not line.startswith(" "):
            current = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif current is not None:
            current.append(line)
    return bodies, entry


def _bytes(shape: str, started: str) -> float:
    """Bytes of a shape, or of a tuple of shapes; one that starts an operation holds what goes in and what comes out."""
    sizes = [math.prod(map(int, filter(None, dims.split(",")))) * _width(kind) / 8 for kind, dims in _SHAPE.findall(shape)]
    if started in ("all-gather", "collective-permute"):
        return sizes[1] if len(sizes) > 1 else sizes[0]
    return sum(sizes)


def _width(kind: str) -> int:
    return _BITS.get(kind) or int(re.match(r"[a-z]+(\d+)", kind).group(1)) if kind in _BITS or re.match(r"[a-z]+\d", kind) else 0


def _group(line: str, devices: int) -> int:
    """How many of the devices take part together; all where the line names no groups."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", line)
    if iota:
        return int(iota.group(1).split(",")[-1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=[^{]*)?\s*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2)))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed.group(1).split(",")) if listed and listed.group(1) else devices
