"""Which tensor of a checkpoint's files goes where in a network, and the copying.

Owns the names: of files' tensors and the network's, of a mixture's experts, which files have one by
one and the network stacked; and of a split model, which part of a file's tensor a rank reads. Each
is read from the memory-mapped file straight into its place. Does not know how a network is built.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from rillgate_server.core.checkpoint import TensorEntry
from rillgate_server.errors import CheckpointError
from rillgate_server.worker.sharding import TensorSplit

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""
ReadStored = Callable[[str], Tensor | None]
"""From a file tensor's name to what it stands for; None: to itself."""

_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
"""Old exports carry it; it is computed."""

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
"""Checkpoints have one tensor per expert, transformers' modules stack them:
gate_up_proj [experts, 2 * intermediate, hidden] (gate first), down_proj [experts, hidden,
intermediate]."""


_STACK = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
"""Some have the stacks, whose parts are layers of their own where they are quantised."""

_Index = tuple[int | slice, ...]
_WHOLE = (slice(None),)
_FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a target, and what of a file's tensor fills it."""

    target: str
    """Name of the network's tensor."""
    part: Tensor
    """The target or a view of it."""
    index: _Index
    """Of the file's tensor."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of a file goes."""

    shape: tuple[int, ...]
    """That the file's tensor must have."""
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        """That it fills."""
        return sum(piece.part.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the network: as the checkpoint has it, and as this rank has it."""

    shape: tuple[int, ...]
    """Of the whole."""
    own: Tensor
    """The whole, or this rank's part of it."""
    split: TensorSplit | None

    @property
    def num_elements(self) -> int:
        """Of its own that a file must fill; what fills a split up to equal parts is zeros."""
        if self.split is None:
            return self.own.numel()
        missing = self.split.length - (self.split.last - self.split.first)
        return self.own.numel() - missing * (self.own.numel() // max(1, self.split.length))


def place_all(
    model: PreTrainedModel,
    entries: dict[str, TensorEntry],
    targets: dict[str, Target],
) -> dict[str, Place]:
    """Map file tensor -> place; raise CheckpointError unless everything fits exactly."""
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()] + [_IGNORED]
    places: dict[str, Place] = {}
    unexpected, misshaped, mistyped = [], [], []
    filled = dict.fromkeys(targets, 0)  # target -> elements that some file tensor fills
    for name, entry in entries.items():
        place = _place(name, targets)
        if place is None:
            is_tied_head = model.config.tie_word_embeddings and name == "lm_head.weight"
            if not is_tied_head and not any(pattern.search(name) for pattern in ignored):
                unexpected.append(name)
            continue
        if place.shape != entry.shape:
            misshaped.append(f"{name} {list(entry.shape)} instead of {list(place.shape)}")
        elif (entry.dtype in _FLOATS) != place.pieces[0].part.is_floating_point():
            mistyped.append(f"{name} ({entry.dtype})")
        else:
            places[name] = place
        for piece in place.pieces:
            filled[piece.target] += piece.part.numel()
    missing = [name for name, count in filled.items() if count < targets[name].num_elements]
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', …' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
            ("of a type that it cannot have", mistyped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the tensors do not fit {type(model).__name__} with this config.json: "
            + "; ".join(problems)
        )
    return places


def _place(name: str, targets: dict[str, Target]) -> Place | None:
    """Find where one file tensor goes; None = nowhere."""
    if name in targets:
        return _place_whole(name, targets[name])
    if stack := _STACK.fullmatch(name):
        return _place_stack(stack[1], stack[2], targets)
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    experts, index, kind = match[1], int(match[2]), match[3]
    name = f"{experts}.{'down_proj' if kind == 'down_proj' else 'gate_up_proj'}"
    if name not in targets or index >= len(targets[name].own):
        return None
    target = targets[name]
    shape, part = target.shape[1:], target.own[index]
    if kind != "down_proj":
        shape = (shape[0] // 2, *shape[1:])
        half = len(part) // 2
        part = part[:half] if kind == "gate_proj" else part[half:]
    if target.split is None:
        return Place(shape, (Piece(name, part, _WHOLE),))
    return Place(shape, (Piece(name, part, _run(target.split, target.split.dim - 1)),))


def _place_stack(experts: str, kind: str, targets: dict[str, Target]) -> Place | None:
    """Place a stacked tensor whose parts are targets, one after another.

    [experts, 2 * intermediate, hidden]   | gate | up | of each expert
    """
    halves = ("down_proj",) if kind == "down_proj" else ("gate_proj", "up_proj")
    num_experts = 0
    while f"{experts}.{num_experts}.{halves[0]}.weight" in targets:
        num_experts += 1
    if not num_experts:
        return None
    num_rows, num_columns = targets[f"{experts}.0.{halves[0]}.weight"].shape
    pieces = []
    for expert in range(num_experts):
        for i, half in enumerate(halves):
            name = f"{experts}.{expert}.{half}.weight"
            target, rows = targets[name], slice(i * num_rows, (i + 1) * num_rows)
            if target.split is None:
                pieces.append(Piece(name, target.own, (expert, rows)))
            elif target.split.dim == 0:
                run = _run(target.split, 0, offset=i * num_rows)
                pieces.append(Piece(name, target.own, (expert, *run)))
            else:
                pieces.append(Piece(name, target.own, (expert, rows, _run(target.split, 1)[1])))
    return Place((num_experts, num_rows * len(halves), num_columns), tuple(pieces))


def _place_whole(name: str, target: Target) -> Place:
    """Place a file's tensor that has the network's name; stacked parts of it are apart in a split.

    file's      | gate rank 0 | gate rank 1 | up rank 0 | up rank 1 |     num_stacked 2
    rank 1's    |             | gate rank 1 |           | up rank 1 |
    """
    split = target.split
    if split is None:
        return Place(target.shape, (Piece(name, target.own, _WHOLE),))
    stacked = target.shape[split.dim] // split.num_stacked
    return Place(
        target.shape,
        tuple(
            Piece(
                name,
                target.own.narrow(split.dim, i * split.length, split.last - split.first),
                _run(split, split.dim, offset=i * stacked),
            )
            for i in range(split.num_stacked)
        ),
    )


def _run(split: TensorSplit, dim: int, offset: int = 0) -> tuple[slice, ...]:
    """Return the index of a rank's run along `dim`."""
    return (*(slice(None),) * dim, slice(offset + split.first, offset + split.last))


def fill_places(
    places: dict[str, Place],
    entries: dict[str, TensorEntry],
    on_progress: Progress | None,
    take_filled: Callable[[str, Tensor], None],
    first: tuple[str, ...] = (),
    read: ReadStored | None = None,
) -> None:
    """Copy every file tensor to its place, file by file, those of `first` before all others;
    `take_filled` hears of each target when the last of what fills it is there, and gets this one's
    rows of the file's tensor, in whole. What `read` knows comes from there."""
    num_missing = Counter(piece.target for place in places.values() for piece in place.pieces)
    total_bytes = sum(place.num_bytes for place in places.values())
    done_bytes = 0
    if on_progress is not None:
        on_progress(0, total_bytes)
    by_file: dict[tuple[bool, Path], list[str]] = {}  # (later, file) -> tensors
    early = set(first)
    later = [name for name in places if name not in early]
    for is_later, group in ((False, first), (True, later)):
        for name in group:
            by_file.setdefault((is_later, entries[name].file), []).append(name)
    for (_, path), names in by_file.items():
        try:
            with safe_open(path, framework="pt") as file:
                for name in names:
                    # A view of the mapped file: pages come in while they are copied, and none
                    # of it counts as this process's own memory. (`get_slice` makes a copy.)
                    stored = read(name) if read is not None else None
                    if stored is None:
                        stored = file.get_tensor(name)
                    for piece in places[name].pieces:
                        piece.part.copy_(stored[piece.index])
                        num_missing[piece.target] -= 1
                        if not num_missing[piece.target]:
                            whole_rows = stored[piece.index[: stored.ndim - 1]]
                            take_filled(piece.target, whole_rows)
                    done_bytes += places[name].num_bytes
                    if on_progress is not None:
                        on_progress(done_bytes, total_bytes)
        except (SafetensorError, OSError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
