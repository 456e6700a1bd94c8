"""What a rank holds of a model, from the settings to something that computes: blocking work, done once.

One rank that holds all of it is the usual case.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.engine.backend import build, cuda_workspace, use_cuda, use_native
from wherry_runtime.engine.resources import Device, cpu_threads
from wherry_runtime.engine.runner import Model
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.model import CAPACITY
from wherry_runtime.kernels.cpu.ranks import DistributedRanks, SharedMemoryRanks, shared_bytes
from wherry_runtime.kernels.cpu.recorder import Ranks
from wherry_runtime.kvcache.formats import KVFormat, choose_format
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.kvcache.states import state_bytes
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import AnyDecoder, choose_dtype, load_model
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.recurrent import RecurrentDecoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.collective import Collective
from wherry_runtime.parallel.group import Place
from wherry_runtime.parallel.shard import check
from wherry_runtime.quantization.mapped import Mapped
from wherry_runtime.quantization.storage import Storage


@dataclass(frozen=True)
class Outline:
    """What is known of a rank's part before a weight is read.

    Attributes:
        model_config: of the whole model.
        model_len: the context that was asked for, or the model's own.
        dtype: of weights that are not quantized, and of what is computed.
        stored: elements of the KV cache.
    """

    config: EngineConfig
    place: Place
    directory: Path
    model_config: ModelConfig
    model_len: int
    device: Device
    threads: int
    dtype: torch.dtype
    stored: KVFormat
    native: bool
    cuda: bool

    @classmethod
    def of(cls, config: EngineConfig, place: Place) -> "Outline":
        """What this rank will hold.

        Raises:
            ModelError: why it cannot.
        """
        device = Device.choose(place.local_rank)
        directory = locate(config.model_uri)
        model_config = read_config(directory)
        check(model_config, place.shard.size)
        model_len = _model_length(config, model_config)
        if model_config.recurrent is not None:
            config = for_states(config, model_len)
        dtype = choose_dtype(config.dtype, model_config, device.torch)
        stored = choose_format(config.kv_cache_dtype, dtype)
        return cls(
            config=config,
            place=place,
            directory=directory,
            model_config=model_config,
            model_len=model_len,
            device=device,
            threads=config.threads or max(1, cpu_threads() // place.per_pod),
            dtype=dtype,
            stored=stored,
            native=use_native(config.backend, model_config, dtype, stored, config.block_size, device.torch),
            cuda=use_cuda(config.backend, model_config, stored, device.torch),
        )

    def shared_memory(self) -> int | None:
        """New memory for the ranks to share, as a descriptor; None where they cannot: in several pods, or not on our
        kernels."""
        if not (self.native and self.place.one_pod):
            return None
        descriptor = os.memfd_create("wherry-ranks")
        os.ftruncate(descriptor, shared_bytes(self.place.shard.size, self.model_config, CAPACITY))
        return descriptor

    def load(self) -> "Part":
        """Reads the weights.

        Raises:
            ModelError: why not.
        """
        config, place, device = self.config, self.place, self.device
        if device.torch.type == "cpu":
            torch.set_num_threads(self.threads)
        try:
            # What is kept packed for the next time has to be packed at once.
            mapped = Mapped() if self.native and not config.weight_cache else None
            storage = Storage(
                *(self.dtype, device.torch, config.quantization, config.quantization_group, self.native), mapped=mapped
            )
        except ValueError as e:
            raise ModelError("bad_setting", str(e)) from e
        cache_root = Path(config.weight_cache).expanduser() if config.weight_cache else None
        model = load_model(self.directory, self.model_config, self.model_len, storage, cache_root, place.shard)
        if isinstance(model, RecurrentDecoder):
            return Part(self, model, state_bytes(model.kept()))
        return Part(self, model, config.block_size * bytes_per_token(model.config, self.stored, native=self.native))


@dataclass(frozen=True)
class Part:
    """A rank's weights.

    Attributes:
        block_bytes: that a block takes in this rank's KV cache.
    """

    outline: Outline
    model: AnyDecoder
    block_bytes: int

    @property
    def kernels(self) -> str:
        """What computes."""
        return library.target() if self.outline.native else "Triton" if self.outline.cuda else "PyTorch"

    def num_blocks(self, beside: int = 0) -> int:
        """KV cache blocks: what was asked for or what memory allows, but no more than a full batch can use.

        Args:
            beside: bytes that a token takes in a second cache as long as this one.

        Raises:
            ModelError: kv_cache_too_small, when there is no room for a single block.
        """
        outline, config = self.outline, self.outline.config
        per_block = self.block_bytes
        if config.kv_cache_bytes:
            memory = config.kv_cache_bytes // outline.place.shard.size
        else:
            rows = min(config.max_batched_tokens, outline.model_len)
            workspace = 0
            if (mapped := self.model.storage.mapped) is not None:
                workspace = mapped.kept_bytes * outline.place.per_pod  # is not taken yet, and will be
            if outline.cuda and isinstance(self.model, Decoder):
                workspace = cuda_workspace(self.model, config.block_size, outline.stored, rows)
            sharing = 1 if outline.cuda else outline.place.per_pod
            memory = outline.device.memory_for_cache(workspace) // sharing
            memory = memory * per_block // (per_block + beside * config.block_size)
        useful = config.max_running * -(-outline.model_len // config.block_size)
        num_blocks = min(memory // per_block, useful)
        if num_blocks < 1:
            raise ModelError(
                "kv_cache_too_small",
                f"{memory} bytes for the KV cache are less than a block of {per_block}; give it more",
            )
        return num_blocks

    def build(self, num_blocks: int, memory: int | None = None, store: tuple[str, int] | None = None) -> Model:
        """The model with a KV cache, ready to compute.

        Args:
            memory: descriptor of the memory that the ranks share, where they do.
            store: where the ranks meet, where they do not.
        """
        outline, config = self.outline, self.outline.config
        ranks: Ranks | None = None
        collective: Collective | None = None
        if memory is not None:
            shared = torch.frombuffer(mmap.mmap(memory, 0), dtype=torch.uint8)
            ranks = SharedMemoryRanks(shared, outline.place.shard, outline.model_config, CAPACITY, outline.threads)
        elif store is not None:
            from wherry_runtime.parallel.distributed import Distributed, join

            group = join(outline.place.shard, store, cuda=outline.device.torch.type == "cuda")
            collective = Distributed(outline.place.shard, outline.model_config, group)
            ranks = DistributedRanks(collective, outline.model_config, CAPACITY) if outline.native else None
        guesses = 0 if config.speculative == "none" else config.max_draft_tokens
        return build(
            self.model,
            num_blocks,
            config.block_size,
            outline.stored,
            native=outline.native,
            cuda=outline.cuda,
            threads=outline.threads,
            max_decodes=config.max_running * (1 + guesses),
            ranks=ranks,
            collective=collective,
        )


def for_states(config: EngineConfig, model_len: int) -> EngineConfig:
    """Settings of a model without attention: a block for each sequence, and no prefixes to share.

    Raises:
        ModelError: bad_setting, for what such a model cannot do.
    """
    if config.speculative != "none":
        raise ModelError("bad_setting", "a model without attention cannot take guesses back; set speculative to none")
    if config.kv_cache_dtype not in ("auto", "float32"):
        raise ModelError(
            "bad_setting", f"the states of a model without attention are float32; {config.kv_cache_dtype} was asked for"
        )
    return msgspec.structs.replace(config, block_size=model_len, prefix_cache=False)


def _model_length(config: EngineConfig, model_config: ModelConfig) -> int:
    """The context to serve.

    Raises:
        ModelError: bad_setting, when more is asked for than the model has.
    """
    own = model_config.max_position_embeddings
    if config.max_model_len > own:
        raise ModelError("bad_setting", f"max_model_len {config.max_model_len} is more than the model's context, {own}")
    return config.max_model_len or own
