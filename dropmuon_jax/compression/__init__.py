"""Compressed communication of workers: compressors, error feedback, and EF21-Muon."""

from dropmuon_jax.compression.compressors import (
    Compressor,
    Damping,
    Identity,
    RandomDropout,
)
from dropmuon_jax.compression.ef21_muon import drop_ef21_muon, ef21_muon, payload_bits
from dropmuon_jax.compression.error_feedback import EF21State, ef21
from dropmuon_jax.compression.exchange import (
    WorkerState,
    on_workers,
    worker_specs,
)
from dropmuon_jax.compression.rounding import Natural, ScaledSign
from dropmuon_jax.compression.selections import ColumnTopK, RankK, TopK
from dropmuon_jax.compression.server_model import (
    ServerModelState,
    check_processes,
    server_model,
    server_params,
    start_from_gradients,
)

__all__ = [
    "ColumnTopK",
    "Compressor",
    "Damping",
    "EF21State",
    "Identity",
    "Natural",
    "RandomDropout",
    "RankK",
    "ScaledSign",
    "ServerModelState",
    "TopK",
    "WorkerState",
    "check_processes",
    "drop_ef21_muon",
    "ef21",
    "ef21_muon",
    "on_workers",
    "payload_bits",
    "server_model",
    "server_params",
    "start_from_gradients",
    "worker_specs",
]
