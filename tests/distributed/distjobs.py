"""Starts several ranks over gloo on this machine, from a fork server: a job takes a fraction of a second."""

import multiprocessing
import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

_SLOW_IMPORTS = (
    "dpp_lightning.tasks.glue.module",
    "dpp_lightning.tasks.causal_lm.module",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen2.modeling_qwen2",
)


def run(job, world, *arguments, nodes=1, lightning=False):
    """What an importable function returns on every rank, by rank.

    Args:
        job: module-level function.
        world: number of ranks.
        arguments: of the function.
        nodes: how many nodes the ranks pretend to be on.
        lightning: leave the process group to Lightning.
    """
    multiprocessing.set_forkserver_preload(["distjobs", "distcases", "strategycases", *_SLOW_IMPORTS])
    with multiprocessing.get_context("forkserver").Manager() as manager:
        results = manager.dict()
        settings = (world, free_port(), job, arguments, results, nodes, lightning)
        processes.start_processes(_rank, args=settings, nprocs=world, start_method="forkserver")
        return dict(sorted(results.items()))


def _rank(rank, world, port, job, arguments, results, nodes, lightning):
    per_node = world // nodes
    places = {"LOCAL_RANK": rank % per_node, "RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": per_node}
    places |= {"GROUP_RANK": rank // per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in places.items()}, TORCHELASTIC_RUN_ID="tests")
    torch.set_num_threads(1)
    failed = False
    try:
        if not lightning:
            dist.init_process_group("gloo", rank=rank, world_size=world)
        results[rank] = job(*arguments)
    except BaseException:
        failed = True
        results[rank] = traceback.format_exc()
        raise
    finally:
        if dist.is_initialized() and not failed:
            dist.destroy_process_group()


def free_port():
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
