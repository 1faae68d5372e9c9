"""What this machine has for a run, what it reaches, and what would be slow or fail here, with the remedy.

Nothing that it returns is a secret: of credentials it says whether there are any, not what they are, and paths under
the home directory begin with ~.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from moma_jax import shipped
from moma_jax.cost import flops_per_token, peak_flops, total_steps
from moma_jax.process import cores
from moma_jax.recipes import recipe
from moma_jax.runs.directory import commit, processor

LEAST_DISK = 5 << 30
"""Bytes, below which a store and some checkpoints may not fit."""
SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "CUDA_VISIBLE_DEVICES", "LIBTPU_INIT_ARGS")
CREDENTIALS = {
    "gs://": (("GOOGLE_APPLICATION_CREDENTIALS",), ".config/gcloud/application_default_credentials.json"),
    "s3://": (("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN"), ".aws/credentials"),
}
"""By scheme of object stores: variables, and the file in the home directory, that hold them."""
EXTRAS = ("tpu", "cuda12", "cuda13", "plan", "plan-gpu", "ray", "convert", "evals", "wandb", "notebooks")
RECIPES = ("quickstart", "paper_90m", "paper_1b4")
"""What is said of the time that a recipe needs."""


def doctor() -> dict[str, Any]:
    """Looks at this machine, which takes some seconds.

    Returns:
      "machine" (processor, cores that this process may use, memory and the free one in bytes, system, Python),
      "packages" (by name: "version", None where it is missing, "tested", the range, and "within"), "extras" (those
      that are installed), "devices" (platform, kind, count, memory in bytes or None, what was measured:
      "product_flops_per_second", "bytes_per_second", and "peak_flops", None where it is not known; "error" alone where
      JAX cannot use them), "settings" of the environment, "disk" (free bytes here, and where compiled programs are
      kept), "stores" (credentials by scheme),
      "recipes" (hours that each would take at least, at the speed of products alone), "commit", and "advice", lines.
    """
    found = {
        "machine": _machine(),
        "packages": _packages(),
        "extras": [name for name in EXTRAS if all(p["within"] for p in _packages(name).values())],
        "devices": _devices_or_error(),
        "settings": {name: _hidden(os.environ[name]) for name in SETTINGS if name in os.environ},
        "disk": _disk(),
        "stores": {scheme: _credentials(*places) for scheme, places in CREDENTIALS.items()},
        "commit": commit(),
    }
    found["recipes"] = {} if "error" in found["devices"] else _hours(found["devices"])
    return found | {"advice": list(_advice(found))}


def _machine() -> dict[str, Any]:
    memory = {}
    if Path("/proc/meminfo").is_file():
        lines = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
        memory = {name: int(value.split()[0]) << 10 for name, _, value in lines}
    return {
        "processor": processor(),
        "cores": cores(),
        "memory": memory.get("MemTotal"),
        "memory_free": memory.get("MemAvailable"),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _packages(extra: str = "") -> dict[str, dict[str, Any]]:
    """The package's requirements, or those of one extra alone, against what is installed."""
    found = {}
    for line in _requirements():
        needed = Requirement(line)
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if always if not extra else (not always and needed.marker.evaluate({"extra": extra})):
            version = _version(needed.name)
            within = version is not None and needed.specifier.contains(version, prereleases=True)
            whole = within and all(_has_extra(needed.name, each) for each in needed.extras)
            found[needed.name] = {"version": version, "tested": str(needed.specifier), "within": whole}
    return found


def _requirements() -> list[str]:
    """None where the package lies on the path without having been installed."""
    try:
        return metadata.requires("moma_jax") or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_extra(name: str, extra: str) -> bool:
    """Whether everything is installed that an extra of another package asks for."""
    lines = map(Requirement, metadata.requires(name) or ())
    asked = [each for each in lines if each.marker and not each.marker.evaluate({"extra": ""})]
    return all(_version(each.name) is not None for each in asked if each.marker.evaluate({"extra": extra}))


def _devices_or_error() -> dict[str, Any]:
    """`_devices`; what a machine without working devices has else is to be told, too."""
    try:
        return _devices()
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": _hidden(words[0])}


def _devices() -> dict[str, Any]:
    import jax  # the others need none

    from moma_jax.bench.chip import measure_chip
    from moma_jax.model.precision import compute_dtype

    device = jax.devices()[0]
    side, elements = (2048, 1 << 24) if device.platform == "cpu" else (8192, 1 << 28)
    measured = measure_chip(side, elements, repeats=5)
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "dtype": compute_dtype(recipe("quickstart").model).name,
        "peak_flops": peak_flops(device.device_kind),
        **{name: measured[name] for name in ("product_flops_per_second", "bytes_per_second")},
    }


def _disk() -> dict[str, Any]:
    from moma_jax.compiling import cache_folder, use_cache

    use_cache(None)
    kept = cache_folder()
    return {"free": shutil.disk_usage(".").free, "compiled_programs": _hidden(kept or "not kept")}


def _credentials(variables: tuple[str, ...], file: str) -> str | None:
    """Where credentials of an object store are; None where nothing of the usual is there."""
    if name := next((name for name in variables if os.environ.get(name)), None):
        return f"${name}"
    return f"~/{file}" if Path.home().joinpath(file).is_file() else None


def _hidden(text: str) -> str:
    """The text with ~ for the home directory, and without what follows the scheme of an address."""
    text, home = re.sub(r"(\w+://)[^\s'\",;]+", r"\1...", text), str(Path.home())
    return text if home == "/" else re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)


def _hours(devices: dict[str, Any]) -> dict[str, float]:
    """Hours of training of some recipes on these devices, were they as fast as they multiply matrices."""
    found = {}
    for name in RECIPES:
        config = recipe(shipped.folder() / f"{name}.py")
        flops = flops_per_token(config) * config.batch_tokens * total_steps(config)
        found[name] = flops / (devices["product_flops_per_second"] * devices["count"] * 3600)
    return found


# Advice ---------------------------------------------------------------------------------------------------------------


def _advice(found: dict[str, Any]) -> Iterator[str]:
    devices, packages = found["devices"], found["packages"]
    for name, package in packages.items():
        if not package["within"]:
            has = "is missing" if package["version"] is None else f"is {package['version']}"
            yield f'{name} {has}, tested is {package["tested"]}: pip install "{name}{package["tested"]}"'
    if "error" in devices:
        asked = found["settings"].get("JAX_PLATFORMS")
        remedy = (
            f"JAX_PLATFORMS={asked} asks for what is not here; unset it" if asked else "see JAX's installation page"
        )
        yield f"JAX has no device to use: {devices['error']}; {remedy}"
        return
    if devices["platform"] == "cpu":
        yield from _unused_accelerators(found["settings"])
        yield (
            "JAX computes on the CPU: quickstart and the small recipes take minutes, the paper's "
            f"{found['recipes']['paper_90m'] / 8760:,.0f} years and more; those want TPUs or GPUs"
        )
    if devices["platform"] == "gpu" and devices["dtype"] == "float32":
        yield f"{devices['kind']} does not compute in bfloat16, so models take float32: twice the memory, less speed"
    reached = devices["product_flops_per_second"] / (devices["peak_flops"] or float("inf"))
    if devices["peak_flops"] and reached < 0.5:
        yield f"products of matrices reach {reached:.0%} of {devices['kind']}'s peak: is something else running on it?"
    machine, disk = found["machine"], found["disk"]
    if machine["memory_free"] is not None and machine["memory_free"] < 4 << 30:
        yield f"{machine['memory_free'] / 2**30:.1f} GiB of memory are free: preparing data wants some 4"
    if disk["free"] < LEAST_DISK:
        yield f"{disk['free'] / 2**30:.1f} GiB are free on this disk: set --run.dir and the stores' paths to another"
    if disk["compiled_programs"] == "not kept":
        yield "compiled programs are not kept: every start compiles again; set --run.compilation-cache to a folder"
    if found["stores"]["gs://"] and importlib.util.find_spec("gcsfs") is None:
        yield 'gs:// has credentials but checkpoints there need gcsfs: pip install "moma_jax[tpu]"'


def _unused_accelerators(settings: dict[str, str]) -> Iterator[str]:
    """Accelerators that the machine has and JAX does not use."""
    there = {"NVIDIA GPU": Path("/proc/driver/nvidia/version"), "TPU": Path("/dev/accel0")}
    extras = {"NVIDIA GPU": "cuda12", "TPU": "tpu"}
    for name, path in there.items():
        if path.exists() and "cpu" in settings.get("JAX_PLATFORMS", ""):
            yield f"the machine has an {name}, which JAX_PLATFORMS={settings['JAX_PLATFORMS']} hides: unset it"
        elif path.exists():
            yield f'the machine has an {name}, which JAX does not see: pip install "moma_jax[{extras[name]}]"'


# For people -----------------------------------------------------------------------------------------------------------


def format_doctor(found: dict[str, Any]) -> str:
    """What `doctor` returned, for the terminal or an issue."""
    machine, devices, disk = found["machine"], found["devices"], found["disk"]
    gib = lambda size: "unknown" if size is None else f"{size / 2**30:,.1f} GiB"  # noqa: E731
    rows = [
        ("machine", f"{machine['processor']}, {machine['cores']} cores to use; {machine['system']}"),
        ("memory", f"{gib(machine['memory'])}, {gib(machine['memory_free'])} free"),
        *_told(devices, gib),
        ("disk", f"{gib(disk['free'])} free here; compiled programs in {disk['compiled_programs']}"),
        *((scheme, place or "no credentials found") for scheme, place in found["stores"].items()),
        *(("set", f"{name}={value}") for name, value in found["settings"].items()),
        ("python", f"{machine['python']}; extras: {', '.join(found['extras']) or 'none'}"),
        *((name, f"{p['version']} (tested {p['tested']})") for name, p in found["packages"].items()),
        *((name, f"{_time(hours)} at least") for name, hours in found["recipes"].items()),
        ("commit", found["commit"] or "of a wheel"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {text}" for name, text in rows]
    return "\n".join([*lines, "", *(f"- {line}" for line in found["advice"] or ["nothing to mend"])]) + "\n"


def _told(devices: dict[str, Any], gib: Any) -> list[tuple[str, str]]:
    """Lines on the devices."""
    if "error" in devices:
        return [("devices", f"none: {devices['error']}")]
    peak = "" if not devices["peak_flops"] else f" of {devices['peak_flops'] / 1e12:,.0f}"
    products = f"{devices['product_flops_per_second'] / 1e12:,.3g}{peak} TFLOP/s; models compute in {devices['dtype']}"
    kind = f"{devices['count']} x {devices['kind']} ({devices['platform']})"
    bandwidth = f"{devices['bytes_per_second'] / 1e9:,.1f} GB/s"
    return [("devices", f"{kind}, {gib(devices['memory'])} each"), ("products", products), ("bandwidth", bandwidth)]


def _time(hours: float) -> str:
    for unit, length in (("years", 8760), ("days", 24), ("hours", 1)):
        if hours >= 2 * length:
            return f"{hours / length:,.0f} {unit}"
    return f"{60 * hours:,.1f} minutes"
