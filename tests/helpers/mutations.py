"""Damaged files by seed: JSON with one thing in it that should not be there, and bytes that were flipped, cut or added.

require_refusals(use, mutants(original, 1000))
"""

import contextlib
import copy
import json
import random
import resource
import signal
import traceback
from pathlib import Path

import pytest

from moma_jax.errors import InputError, RunError

SECONDS, MEMORY, LONGEST = 20, 3 << 30, 1000
"""What one use may take, how much memory all of them may add, and how many characters a refusal has at most."""
COUNTS = [25, pytest.param(1000, marks=pytest.mark.long)]
"""Inputs of a test, few and many."""
DEEP, TWIN, HUGE, ENDLESS = "@deep@", "@twin@", "@huge@", "@endless@"
SPELLED = {
    f'"{DEEP}"': "[" * 100_000 + "]" * 100_000,
    f'"{HUGE}"': "9" * 400,
    f'"{ENDLESS}"': "9" * 5000,
    TWIN: "",
}
"""What Python's json module cannot write, or only one of: nests, long numbers, a key that is there twice."""
NASTY = (
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63 - 1, 2**63, -(2**63),
    2**64, 10**12, HUGE, ENDLESS, DEEP, 0.0, -0.0, 0.5, 1.0, -1.5, 1e308, -1e308, 5e-324, float("nan"), float("inf"),
    float("-inf"), "", " ", "x", "0", "1", "None", "null", "nan", "\0", "\n", "\ud800", "\ufeff", "\u202e",
    "\U0001f389", "../../../etc/passwd", "/dev/zero", "a" * 100_000, "%s%n{0}", "[red]", "[/]", "<script>", "gs://",
    [], {}, [[]], [None], [0], [1, 2], [-1], ["x"], [{}], [1e308, "x"], [[1, 2], [3]], [10**12], [0] * 10_000,
    {"": None}, {"x": 1}, {"format_version": 1}, {"__array__": ["<i8", [10**12], ""]}, {"__array__": []},
    {"__array__": ["O", [1], "AAAA"]}, {"__array__": ["<i8", [], "AAAAAAAAAAA="]},
    {"__array__": ["<f8", [1], "AAAAAAAA+H8="]},
)  # fmt: skip


def places(value, path=()):
    """Paths of all values of a JSON document, the document's own, (), included."""
    found = [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += places(item, (*path, key))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


def put(document, path, value):
    """The document with another value at a path."""
    if not path:
        return value
    at(document, path[:-1])[path[-1]] = value
    return document


def damaged(document, chance: random.Random):
    """The document with one to three changes of its structure."""
    document = copy.deepcopy(document)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        document = _changed(document, chance)
    return document


def _changed(document, chance: random.Random):
    # First how deep, then where: else most changes would be to the items of its longest list.
    deep = {}
    for path in places(document):
        deep.setdefault((len(path), *map(str, path[:1])), []).append(path)
    path = chance.choice(deep[chance.choice(sorted(deep))])
    value, holder = at(document, path), at(document, path[:-1])
    match chance.randrange(8):
        case 0 if path:
            del holder[path[-1]]
        case 1 if path and isinstance(holder, dict):
            holder[chance.choice((f"{path[-1]}_", "", "x", str(path[-1]).upper(), "\ud800"))] = holder.pop(path[-1])
        case 2 if path and isinstance(holder, dict):
            holder[f"{path[-1]}{TWIN}"] = chance.choice(NASTY)
        case 3 if path:
            other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[path[-1]], holder[other] = holder[other], holder[path[-1]]
        case 4:
            return put(document, path, _retyped(value))
        case 5 if type(value) in (int, float):
            factors = (-1, 2, 10, 1e6, 0.5)
            more = chance.choice((value + 1, value - 1, value + 1000, *(type(value)(value * f) for f in factors)))
            return put(document, path, more)
        case _:
            return put(document, path, copy.deepcopy(chance.choice(NASTY)))
    return document


def _retyped(value):
    """The value as another type would have it."""
    match value:
        case dict():
            return list(value.items())
        case list():
            return dict(zip(map(str, range(len(value))), value, strict=True))
        case str():
            return [value]
        case _:
            return str(value)


def written(document) -> bytes:
    """The document as JSON, with what `SPELLED` stands for."""
    text = json.dumps(document)
    for short, long in SPELLED.items():
        text = text.replace(short, long)
    return text.encode()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One of the ways in which files get damaged."""
    data = bytearray(content)
    place = chance.randrange(len(data))
    match chance.randrange(6):
        case 0:
            data[place] ^= 1 << chance.randrange(8)
        case 1:
            for _ in range(chance.randrange(1, 40)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case 2:
            del data[place:]
        case 3:
            del data[place : place + chance.randrange(1, 600)]
        case 4:
            data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 600)))
        case 5:
            data[place : place + 64] = b"\xff" * 64
    return bytes(data)


def mutants(content: bytes, count: int, seed: int = 0):
    """So many damaged versions of a JSON file: three of four in their structure, the others in their bytes."""
    chance, document = random.Random(seed), json.loads(content)
    for _ in range(count):
        yield mutated(content, chance) if chance.random() < 0.25 else written(damaged(document, chance))


@contextlib.contextmanager
def replacing(folder):
    """What reads a file of a folder, and puts others in its place; all are there again at the end."""
    before = {}

    def replaced(name, content=None):
        path = Path(folder, name)
        before.setdefault(path, path.read_bytes())
        if content is None:
            return before[path]
        path.write_bytes(content)

    try:
        yield replaced
    finally:
        for path, content in before.items():
            path.write_bytes(content)


@contextlib.contextmanager
def bounded(memory=MEMORY):
    """Memory beyond what the process has: MemoryError."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _too_long(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def require_refusals(use, contents) -> None:
    """Fails unless `use` makes of each content a result, or a refusal in one short line; of failures each kind once."""
    wrong, refused = {}, 0
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        with bounded():
            for number, content in enumerate(contents):
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    use(content)
                except (InputError, RunError) as error:
                    refused += 1
                    if "\n" in str(error) or len(str(error)) > LONGEST:
                        wrong.setdefault(str(error)[:20], []).append(
                            f"{number}: not one short line: {str(error)[:200]!r}"
                        )
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    told = f"{number}: {content[:300]!r}\n{traceback.format_exc()}"
                    wrong.setdefault((type(error), place.filename, place.lineno), []).append(told)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not wrong, "\n".join(f"{len(each)} times, such as {each[0]}" for each in wrong.values())
    assert refused, "nothing was refused: are these damaged?"
