"""The command line that all models share, and the devices that it asks for."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tensorflow as tf

from trainer.data import UserError
from trainer.norms import NORMS

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
DEFAULT_SPLIT = "/cpu:0,/gpu:0"


# The command line. ----------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """An argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


def positive(text: str) -> float:
    """An argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def seed(text: str) -> int:
    """An argument type: what NumPy, TensorFlow and Python all take for a seed."""
    if not text.isdecimal() or not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**31 - 1, not {text!r}")
    return int(text)


def add_training_arguments(parser: argparse.ArgumentParser, *, epochs: int, batch_size: int, rate: float) -> None:
    """What to train on, for how long, and how."""
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=count, default=epochs, help=f"passes over the images (default: {epochs})")
    group.add_argument("--batch-size", type=count, default=batch_size, help=f"images a step (default: {batch_size})")
    group.add_argument("--limit", type=count, metavar="N", help="train on N of the images only (default: all)")
    group.add_argument("--learning-rate", type=positive, default=rate, help=f"at the beginning (default: {rate})")
    group.add_argument("--seed", type=seed, default=0, help="of weights, order and dropout (default: 0)")
    group.add_argument("--norm", choices=NORMS, default=NORMS[0], help="batch norm (default: tfops); see norms.py")
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="of activations (default: float32)")


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """Where a run is kept, and what is kept of it."""
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path(out), help=f"folder of the run (default: {out})")
    group.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint, if there is one")
    group.add_argument("--profile", action="store_true", help="run TensorFlow's profiler on steps 10 to 15")


def add_device_arguments(parser: argparse.ArgumentParser, style: str) -> None:
    """Devices; several of them in Keras ("keras"), split in two in a graph ("graph"); "both": one device."""
    group = parser.add_argument_group("devices")
    group.add_argument("--device", help="/cpu:0, /gpu:0 or /gpu:1, say (default: TensorFlow's choice)")
    group.add_argument(
        "--memory-growth",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take GPU memory as it is needed, not all at once",
    )
    group.add_argument(
        "--soft-placement",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let TensorFlow run an op elsewhere if the device has no kernel for it",
    )
    group.add_argument("--log-device-placement", action="store_true", help="print where every op runs")
    group.add_argument(
        "--logical-cpus", type=count, default=1, metavar="N", help="N CPU devices of this machine's CPU, to try things"
    )
    if style == "graph":
        group.add_argument(
            "--split-devices",
            nargs="?",
            const=DEFAULT_SPLIT,
            metavar="A,B",
            help=f"graph and variables on A, loss and optimization on B (if no devices are named: {DEFAULT_SPLIT})",
        )
    if style == "keras":
        group.add_argument(
            "--devices", metavar="N|A,B,...", help="train on N devices of this machine, or on those named, in step"
        )
        group.add_argument(
            "--workers", metavar="HOST:PORT,...", help="train on several machines (or set TF_CONFIG); see --index"
        )
        group.add_argument("--index", type=int, metavar="I", help="which of --workers this process is, from 0")
        group.add_argument(
            "--synchronized",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="batch norm's statistics over all devices, with several of them",
        )
        group.add_argument(
            "--timeout", type=count, default=60, metavar="SECONDS", help="for another worker's answer (default: 60)"
        )


def run_main(parse: Callable, configure: Callable, train: Callable, argv: Sequence[str] | None) -> int:
    """Parses, configures and trains. What the user can put right becomes one line. Returns the exit status."""
    options = parse(argv)
    try:
        configure(options)
        train(options)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0


# Devices. -------------------------------------------------------------------------------------------------------------


def device_name(text: str, logical_cpus: int = 1) -> str:
    """The full name, such as "/device:GPU:0", of a device of this machine.

    Args:
        text: "cpu", "cpu:0", "/cpu:0", "/device:CPU:0", ...; likewise for gpu.
        logical_cpus: How many devices the CPU is.

    Raises:
        UserError: There is no such device; the message lists what there is.
    """
    here = [f"/cpu:{i}" for i in range(logical_cpus)]
    here += [f"/gpu:{i}" for i in range(len(tf.config.list_physical_devices("GPU")))]
    match = re.fullmatch(r"/?(?:device:)?(cpu|gpu)(?::(\d+))?", text.strip().lower())
    short = match and f"/{match[1]}:{int(match[2] or 0)}"
    if short not in here:
        raise UserError(f"no device {text!r} here, only {', '.join(here)}")
    kind, index = short[1:].split(":")
    return f"/device:{kind.upper()}:{index}"


def device_list(text: str, logical_cpus: int = 1) -> list[str]:
    """The devices of "A,B,...", or the first N of "N": GPUs, or CPU devices where there is no GPU."""
    if text.isdecimal():
        kind = "gpu" if tf.config.list_physical_devices("GPU") else "cpu"
        if int(text) < 1:
            raise UserError(f"--devices must be at least 1, not {text}")
        return [device_name(f"/{kind}:{i}", logical_cpus) for i in range(int(text))]
    names = [device_name(part, logical_cpus) for part in text.split(",")]
    if len(set(names)) != len(names):
        raise UserError(f"--devices names a device twice: {text!r}")
    return names


def check_devices(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Replaces names of devices by full names; ends the program with status 2 if there is no such device."""
    split, devices = getattr(options, "split_devices", None), getattr(options, "devices", None)
    several = getattr(options, "workers", None) or "TF_CONFIG" in os.environ
    argument = "--device"
    try:
        if options.device is not None:
            options.device = device_name(options.device, options.logical_cpus)
            if hasattr(options, "devices") and re.fullmatch("/device:CPU:[1-9].*", options.device):
                raise UserError(f"in Keras, a CPU device is /cpu:0 (or one of --devices), not {options.device}")
            if split or devices:
                raise UserError("means nothing beside " + ("--split-devices" if split else "--devices"))
        argument = "--split-devices"
        if split is not None:
            options.split_devices = [device_name(part, options.logical_cpus) for part in split.split(",")]
            if len(options.split_devices) != 2:
                raise UserError(f"must be two devices, A,B, not {split!r}")
        argument = "--devices"
        if devices is not None:
            if several:
                raise UserError("means nothing beside --workers and TF_CONFIG: there each process has its own devices")
            if devices.isdecimal() and not tf.config.list_physical_devices("GPU"):
                options.logical_cpus = max(options.logical_cpus, int(devices))
            options.devices = device_list(devices, options.logical_cpus)
        argument = "--workers"
        if getattr(options, "workers", None):
            options.workers = options.workers.split(",")
            if options.index is None or not 0 <= options.index < len(options.workers):
                raise UserError(
                    f"needs --index from 0 to {len(options.workers) - 1}, one for each process, not {options.index}"
                )
            if not all(re.fullmatch(r"[^:\s]+:\d+", worker) for worker in options.workers):
                raise UserError(f"must be HOST:PORT,HOST:PORT,..., not {','.join(options.workers)!r}")
    except UserError as error:
        parser.error(f"argument {argument}: {error}")


def configure(options: argparse.Namespace) -> None:
    """Sets TensorFlow's devices up. Call it before anything else that TensorFlow does."""
    tf.get_logger().setLevel("ERROR")  # no warnings that tf.compat.v1 is of version 1
    tf.debugging.set_log_device_placement(options.log_device_placement)
    tf.config.set_soft_device_placement(options.soft_placement)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, options.memory_growth)
    if options.device and hasattr(options, "devices"):
        # Keras is told by leaving it no other device. In a graph, tf.device tells.
        kind, index = options.device.split(":")[1:]
        tf.config.set_visible_devices([gpus[int(index)]] if kind == "GPU" else [], "GPU")
    if options.logical_cpus > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration() for _ in range(options.logical_cpus)]
        tf.config.set_logical_device_configuration(cpu, logical)
    if not gpus or (options.device or "").startswith("/device:CPU"):
        # On the CPU this costs little and makes a run repeatable to the bit. A GPU would lose its fastest kernels.
        tf.config.experimental.enable_op_determinism()


def configure_workers(options: argparse.Namespace) -> None:
    """Writes --workers and --index to where TensorFlow looks for them."""
    if options.workers:
        os.environ["TF_CONFIG"] = json.dumps(
            {"cluster": {"worker": options.workers}, "task": {"type": "worker", "index": options.index}}
        )


def session_config(options: argparse.Namespace) -> tf.compat.v1.ConfigProto:
    """The same settings for a session: it does not ask `tf.config`."""
    return tf.compat.v1.ConfigProto(
        allow_soft_placement=options.soft_placement,
        log_device_placement=options.log_device_placement,
        device_count={"CPU": options.logical_cpus},
        gpu_options=tf.compat.v1.GPUOptions(allow_growth=options.memory_growth),
    )
