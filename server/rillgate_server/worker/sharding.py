"""How a model is split over ranks: which part of which tensor is a rank's own.

Owns the split, and that it divides. It follows the architecture's own plan (transformers'
`base_model_tp_plan`), whose styles mean:

    colwise          [out, in]: a run of output features; heads of queries, keys and values
    rowwise          [out, in]: a run of input features; the ranks' outputs are summed
    packed_colwise   [experts, 2 * out, in]: gate and up are split each by itself
    moe_tp_experts   the experts' output is summed (every expert is on all ranks, a part of each)
    replicated_...   whole on every rank

What the plans leave out is split here: embedding and head by vocabulary (the last rank's rows are
filled up with zeros), and DeepSeek-V3's latent attention by heads, behind its compressed vectors.

    4 query heads, 2 key/value heads      K = 2: q q | q q      K = 4: q | q | q | q
                                                 k   | k               k | k | k | k  (each twice)

Does not know files (worker.model_loader reads the slices) nor how ranks talk.
Method: Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rillgate_server.errors import ConfigError
from rillgate_server.worker.collectives import Collectives

_LATENT_ATTENTION_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
"""Of DeepSeek-V3; transformers leaves its attention whole, and with it most of its cache."""
_SUMMED = ("rowwise", "moe_tp_experts")
"""Styles of modules whose output is a part of a sum."""
_SPLIT = ("colwise", "packed_colwise")
_WHOLE = "replicated"  # styles of this beginning


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """A rank's part of a tensor: the same run of each of its stacked parts along `dim`."""

    dim: int
    first: int
    """In one stacked part."""
    last: int
    length: int
    """Of the run in the rank's own tensor; longer than last - first where zeros fill it up."""
    num_stacked: int = 1

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rank's own tensor."""
        return (*shape[: self.dim], self.length * self.num_stacked, *shape[self.dim + 1 :])


def check_split(config: PreTrainedConfig, ranks: int) -> None:
    """Raise ConfigError that names what `ranks` cannot share evenly. Costs nothing."""
    kv_heads = _num_kv_heads(config)
    widths = {
        name: getattr(config, name)
        for name in ("num_attention_heads", "intermediate_size", "moe_intermediate_size")
        if getattr(config, name, None)
    }

    def problems(ranks: int) -> list[str]:
        found = [f"{name} {width}" for name, width in widths.items() if width % ranks]
        if kv_heads % ranks and ranks % kv_heads:
            found.append(f"num_key_value_heads {kv_heads} (which {ranks} does not hold evenly)")
        return found

    if not (found := problems(ranks)):
        return
    heads = config.num_attention_heads
    allowed = [k for k in range(1, heads + 1) if not problems(k)]
    raise ConfigError(
        f"replica.tensor_parallel_size is {ranks}, which does not divide the model's "
        f"{', '.join(found)}; allowed for this model: {', '.join(map(str, allowed))}"
    )


def heads_of_rank(num_heads: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return (first, last + 1) of a rank's heads; fewer heads than ranks are on several ranks."""
    if num_heads < ranks:
        first = rank * num_heads // ranks
        return first, first + 1
    own = num_heads // ranks
    return rank * own, (rank + 1) * own


class Sharding:
    """One rank's part of a model. State: none after its making."""

    def __init__(self, config: PreTrainedConfig, rank: int, ranks: int) -> None:
        """Take what `check_split` has found good."""
        self._config = config
        self.rank = rank
        self.ranks = ranks
        plan = dict(getattr(config, "base_model_tp_plan", None) or {})
        plan.pop("embed_tokens", None)  # there in transformers 5.17 for tied models; split below
        if config.model_type == "deepseek_v3":
            plan = _LATENT_ATTENTION_PLAN | plan
        for key, style in plan.items():
            if style not in (*_SUMMED, *_SPLIT) and not style.startswith(_WHOLE):
                raise ConfigError(
                    f"replica.tensor_parallel_size is {ranks}, but this transformers splits {key} "
                    f"in a way that is not known here ({style!r}); allowed: 1, or a release of "
                    "transformers whose plan for the model is known"
                )
        self._styles = [(_pattern(key), style) for key, style in plan.items()]

    def __repr__(self) -> str:
        """Show whose part it is."""
        return f"Sharding(rank={self.rank}, ranks={self.ranks})"

    def split_of(self, name: str, shape: tuple[int, ...]) -> TensorSplit | None:
        """Return a rank's part of the network's tensor `name`; None: it is whole on every rank."""
        module, _, kind = name.rpartition(".")
        if module.endswith("embed_tokens") or module == "lm_head":
            return self._split_vocabulary(shape[0])
        style = self._style(name) or self._style(module)
        if style == "colwise":
            return self._split_outputs(module, shape[0])
        if style == "packed_colwise":
            return self._even(dim=1, length=shape[1], num_stacked=2)
        if style == "rowwise" and kind != "bias":
            return self._even(dim=len(shape) - 1, length=shape[-1])
        return None

    def is_added_by_another(self, name: str) -> bool:
        """Whether a tensor is added to a sum of all ranks' outputs, and rank 0 adds it."""
        module, _, kind = name.rpartition(".")
        return self.rank > 0 and kind == "bias" and self._style(module) == "rowwise"

    def summed_modules(self, model: nn.Module) -> Iterator[nn.Module]:
        """Give the modules whose outputs are to be summed over ranks."""
        for name, module in model.named_modules():
            if self._style(name) in _SUMMED:
                yield module

    def _style(self, name: str) -> str | None:
        return next((style for pattern, style in self._styles if pattern.fullmatch(name)), None)

    def _split_outputs(self, module: str, length: int) -> TensorSplit:
        """Split output features: keys and values by head, which several ranks may need."""
        num_heads = _num_kv_heads(self._config)
        if module.rpartition(".")[2] not in ("k_proj", "v_proj"):
            return self._even(dim=0, length=length)
        first, last = heads_of_rank(num_heads, self.rank, self.ranks)
        dim = length // num_heads
        return TensorSplit(0, first * dim, last * dim, (last - first) * dim)

    def _split_vocabulary(self, num_rows: int) -> TensorSplit:
        own = -(-num_rows // self.ranks)
        first, last = (min(num_rows, rank * own) for rank in (self.rank, self.rank + 1))
        return TensorSplit(0, first, last, own)

    def _even(self, dim: int, length: int, num_stacked: int = 1) -> TensorSplit:
        own = length // num_stacked // self.ranks
        return TensorSplit(dim, self.rank * own, (self.rank + 1) * own, own, num_stacked)


class VocabularyEmbedding(nn.Module):
    """A rank's rows of an embedding; tokens of other ranks' rows come from there."""

    def __init__(self, embedding: nn.Module, num_rows: int, collectives: Collectives) -> None:
        """Take over what looks up this rank's `num_rows` rows."""
        super().__init__()
        self.embedding = embedding
        self._num_rows = num_rows
        self._collectives = collectives
        self._first = collectives.rank * num_rows

    @property
    def weight(self) -> Tensor | None:
        """The rows, by which a tied head is known; None where they are quantised."""
        weight: Tensor | None = getattr(self.embedding, "weight", None)
        return weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up on all ranks. Returns [..., hidden_size]; all other ranks add zeros."""
        rows = tokens - self._first
        is_other = (rows < 0) | (rows >= self._num_rows)
        found: Tensor = self.embedding(rows.masked_fill(is_other, 0))
        return self._collectives.all_reduce(found.masked_fill_(is_other[..., None], 0.0))


def connect_embedding(model: PreTrainedModel, collectives: Collectives) -> None:
    """Let a model whose embedding is one rank's rows look tokens up on all ranks."""
    embedding: Any = model.get_input_embeddings()
    is_plain = isinstance(embedding, nn.Embedding)  # whose num_embeddings is the config's
    num_rows = len(embedding.weight) if is_plain else embedding.num_embeddings
    if is_plain:
        embedding.padding_idx = None  # of training alone, and may lie in another rank's rows
    model.set_input_embeddings(VocabularyEmbedding(embedding, num_rows, collectives))


def connect_layers(model: PreTrainedModel, sharding: Sharding, collectives: Collectives) -> None:
    """Put the sums over ranks into a model whose weights are one rank's parts, packed or not."""

    def add_up(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
        return collectives.all_reduce(output.contiguous())

    for module in sharding.summed_modules(model):
        module.register_forward_hook(add_up)


def _num_kv_heads(config: PreTrainedConfig) -> int:
    """Return how many heads of keys there are; latent attention makes one per query head."""
    heads = config.num_key_value_heads or config.num_attention_heads
    return int(config.num_attention_heads if config.model_type == "deepseek_v3" else heads)


def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(r"model\." + re.escape(key).replace(r"\*", r"\d+"))
