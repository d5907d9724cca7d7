"""Count the waves of a layer's GEMMs, and cut a batch where its two halves need the fewest.

A GEMM computes its output in tiles, one per SM at a time; one round over all SMs is a wave, and a
round that is not full takes as long as a full one. Integers only, so that all ranks cut alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple


class Tile(NamedTuple):
    """The part of a GEMM's output that one CTA computes at a time."""

    columns: int
    tokens: int


# GEMMs take steps of so many rows: a first half that ends between two pays for the next one.
ROW_STEP = 128
# cuBLAS on Hopper: at most 32768 accumulators a CTA, kernels in clusters of two along the columns.
_CLUSTER = 2
_TILES = [Tile(a, b) for a in (64, 128, 192, 256) for b in range(16, 257, 16) if a * b <= 32768]
# Waves of a half and of the whole compare only if counted in the same tile, so a GEMM has one. Its
# height is a power of two: then the GEMMs of a layer agree on where a row of tiles ends.
_COUNTING_TILES = (Tile(128, 256), Tile(128, 128))
_COUNTING_TOKENS = 2048  # half of a 4096-token batch
_GROUPED_TILE = Tile(128, 64)  # of a Triton fused-MoE kernel, which has no clusters
# Cuts are at most one part of so many off the middle, of the tokens. In the committed tables they
# were 0.5 % slower than the best of their size and CTAs (at most 3 %); those of the fewest waves,
# up to a quarter off, 0.9 % (at most 16 %).
OFF_THE_MIDDLE = 32


@dataclass(frozen=True)
class GemmShape:
    """One rank's share of a linear layer; of each expert's, if there are several experts.

    Raises:
        ValueError: a size is not a positive integer, or `top_k` exceeds `experts`.
    """

    name: str
    n: int  # output columns
    k: int  # input columns
    experts: int = 1
    top_k: int = 1  # experts that a token visits

    def __post_init__(self) -> None:
        for field in ("n", "k", "experts", "top_k"):
            _check_positive(f"{self.name}.{field}", getattr(self, field))
        if self.top_k > self.experts:
            raise ValueError(f"{self.name}.top_k is {self.top_k}; experts are {self.experts}")


@dataclass(frozen=True)
class LayerShape:
    """The GEMMs of one transformer layer on one rank."""

    gemms: tuple[GemmShape, ...]


def dense_layer(
    hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, world_size: int
) -> LayerShape:
    """Return one rank's GEMMs of a dense layer under tensor parallelism.

    Raises:
        ValueError: heads or intermediate columns do not divide among the ranks.
    """
    heads = _share("heads", heads, world_size)
    # Fewer key-value heads than ranks are copied, so that every rank has one.
    kv_heads = _share("kv_heads", kv_heads, min(kv_heads, world_size))
    intermediate = _share("intermediate", intermediate, world_size)
    return LayerShape(
        (
            GemmShape("qkv", n=(heads + 2 * kv_heads) * head_dim, k=hidden),
            GemmShape("o", n=hidden, k=heads * head_dim),
            GemmShape("gate_up", n=2 * intermediate, k=hidden),
            GemmShape("down", n=hidden, k=intermediate),
        )
    )


def moe_layer(dense: LayerShape, experts: int, top_k: int) -> LayerShape:
    """Return `dense` with experts in place of its MLP; its `intermediate` is that of one expert.

    Every rank holds a share of every expert, and every expert gets its expected share of the
    tokens. Ignored: uneven routing, idle experts, the router, shared experts, expert parallelism.
    """
    attention, mlp = dense.gemms[:2], dense.gemms[2:]
    grouped = (replace(gemm, experts=experts, top_k=top_k) for gemm in mlp)
    return LayerShape((*attention, *grouped))


def transformer_layer(
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    experts: int,
    top_k: int,
    world_size: int,
) -> LayerShape:
    """Return one rank's GEMMs of a layer: of a dense one where `experts` is 1.

    Raises:
        ValueError: as of `dense_layer`.
    """
    dense = dense_layer(hidden, heads, kv_heads, head_dim, intermediate, world_size)
    return dense if experts == 1 else moe_layer(dense, experts, top_k)


def waves(gemm: GemmShape, num_tokens: int, num_sms: int) -> int:
    """Return the waves of a GEMM over `num_tokens` on `num_sms` SMs, in its counting tile."""
    _check_positive("num_tokens", num_tokens)
    return _grid(gemm, counting_tile(gemm, num_sms), num_sms).waves(num_tokens)


def layer_waves(layer: LayerShape, num_tokens: int, num_sms: int) -> int:
    """Return the waves of all GEMMs of a layer over `num_tokens`."""
    return sum(waves(gemm, num_tokens, num_sms) for gemm in layer.gemms)


def extra_permille(layer: LayerShape, num_tokens: int, cut: int, num_sms: int) -> int:
    """Return by how much the halves' waves exceed those of the whole, in 1/1000 of these.

    Rounded up, and 0 where they do not. An upper bound of the computation that a cut adds.
    """
    whole = layer_waves(layer, num_tokens, num_sms)
    halves = sum(layer_waves(layer, part, num_sms) for part in (cut, num_tokens - cut))
    return _ceil_div(1000 * max(halves - whole, 0), whole) if whole else 0


def predicted_us(gemm: GemmShape, num_tokens: int, num_sms: int) -> float:
    """Predict the time of a bf16 GEMM that runs alone, in microseconds, with its fastest tile.

    With w waves of tiles of A columns and B tokens, and K input columns: `2.8 + w * (0.95 +
    K/1000 * (2.83 * A*B/1e4 + 0.295 * (A+B)/100))`, but at least bytes / 4 TB/s. Fitted on one
    H200, cuBLAS 13.1, 256 to 4096 tokens: median error 3 %, 90 % within 9 %, worst 15 %; 5 % low
    above 500 us. A guess for other GPUs, FP8 and experts. It orders choices, it measures nothing.
    """
    _check_positive("num_tokens", num_tokens)
    _check_sms(num_sms)
    tiles = _TILES if gemm.experts == 1 else [_GROUPED_TILE]
    return min(_femtoseconds(gemm, tile, num_tokens, num_sms) for tile in tiles) / 1e9


@lru_cache(maxsize=256)
def counting_tile(gemm: GemmShape, num_sms: int) -> Tile:
    """Choose the tile that a GEMM's waves are counted in: the faster one at 2048 tokens."""
    _check_sms(num_sms)
    if gemm.experts > 1:
        return _GROUPED_TILE
    return min(
        _COUNTING_TILES, key=lambda tile: _femtoseconds(gemm, tile, _COUNTING_TOKENS, num_sms)
    )


def best_cut(lengths: tuple[int, ...], layer: LayerShape, num_sms: int, align: int = 1) -> int:
    """Return the tokens of the first half for the fewest waves close to the middle.

    TokenWeave (arXiv 2505.11329) wants no more waves of the halves than of the whole. But a half
    that is shorter hides less of the other's communication, and that soon costs more than a wave:
    cuts are at most 1/32 of the tokens off the middle, or the most even that `align` allows. Ties
    go to the most even cut, then to one between two requests, then to the smaller.

    Args:
        lengths: new tokens of each request, in batch order.
        layer: the GEMMs of one layer on one rank.
        num_sms: SMs left to the GEMMs: the GPU's less those of the communication.
        align: the cut is a multiple of it.

    Raises:
        ValueError: no multiple of `align` lies strictly inside the batch.
    """
    cuts = _best_cuts(sum(lengths), layer, num_sms, align)
    between = set(accumulate(lengths)) if len(cuts) > 1 else set()
    return min(cuts, key=lambda cut: (cut not in between, cut))


def cut_beside(
    lengths: tuple[int, ...], layer: LayerShape, num_sms: int, offset: int, align: int = 1
) -> int:
    """Return the cut that is `offset` tokens behind the best one, or the nearest that there is.

    Args and errors are those of `best_cut`.
    """
    wanted = (best_cut(lengths, layer, num_sms, align) + offset) // align * align
    return min(max(wanted, align), (sum(lengths) - 1) // align * align)


@lru_cache(maxsize=4096)
def _best_cuts(num_tokens: int, layer: LayerShape, num_sms: int, align: int) -> tuple[int, ...]:
    """Return the cut of fewest waves and greatest evenness, or both if two mirror each other."""
    _check_positive("align", align)
    if num_tokens <= align:
        raise ValueError(f"{num_tokens} tokens hold no multiple of align={align} strictly inside")
    grids = [_grid(gemm, counting_tile(gemm, num_sms), num_sms) for gemm in layer.gemms]
    unevenness = {cut: abs(2 * cut - num_tokens) for cut in _candidates(num_tokens, grids, align)}
    tolerated = max(2 * num_tokens // OFF_THE_MIDDLE, min(unevenness.values()))

    def waves_of_halves(cut: int) -> int:
        return sum(grid.waves(cut) + grid.waves(num_tokens - cut) for grid in grids)

    costs = {
        cut: (waves_of_halves(cut), uneven)
        for cut, uneven in unevenness.items()
        if uneven <= tolerated
    }
    best = min(costs.values())
    return tuple(cut for cut, cost in costs.items() if cost == best)


class _Grid(NamedTuple):
    """The tiles of a GEMM as a function of its tokens."""

    tiles_per_row: int  # of all experts together
    visits_per_row: int  # tokens times the experts they visit, of all experts together
    top_k: int
    ctas: int

    def rows(self, num_tokens: int) -> int:
        return _ceil_div(num_tokens * self.top_k, self.visits_per_row)

    def waves(self, num_tokens: int) -> int:
        return _ceil_div(self.tiles_per_row * self.rows(num_tokens), self.ctas)


def _grid(gemm: GemmShape, tile: Tile, num_sms: int) -> _Grid:
    cluster = _CLUSTER if gemm.experts == 1 else 1  # needs all its tiles and all its SMs
    columns = _ceil_div(_ceil_div(gemm.n, tile.columns), cluster) * cluster
    ctas = num_sms // cluster * cluster
    return _Grid(gemm.experts * columns, gemm.experts * tile.tokens, gemm.top_k, ctas)


def _candidates(num_tokens: int, grids: list[_Grid], align: int) -> Iterator[int]:
    """Yield the cuts among which the best of all cuts is: where waves end, and the middle.

    The first half's waves step up only after the last token of a full wave, the second half's step
    down only at its mirror image; in between, nothing but the evenness changes.
    """
    ends = {num_tokens // 2}
    for grid in grids:
        for row in range(1, grid.rows(num_tokens)):
            tokens = row * grid.visits_per_row // grid.top_k
            if grid.waves(tokens) < grid.waves(tokens + 1):
                ends.add(tokens)
    floors = {end // align * align for end in ends}
    ceilings = {_ceil_div(num_tokens - end, align) * align for end in ends}
    return (cut for cut in sorted(floors | ceilings) if 0 < cut < num_tokens)


def _femtoseconds(gemm: GemmShape, tile: Tile, num_tokens: int, num_sms: int) -> int:
    """Evaluate the formula of `predicted_us` for one tile, without a float."""
    area, edges = tile.columns * tile.tokens, tile.columns + tile.tokens
    wave = 950_000_000 + gemm.k * (283 * area + 2950 * edges)
    compute = 2_800_000_000 + _grid(gemm, tile, num_sms).waves(num_tokens) * wave
    visits = num_tokens * gemm.top_k
    num_bytes = 2 * (gemm.experts * gemm.n * gemm.k + visits * (gemm.n + gemm.k))
    return max(compute, num_bytes * 250)  # 4 TB/s is a byte every 250 fs


def _share(name: str, count: int, world_size: int) -> int:
    _check_positive("world_size", world_size)
    _check_positive(name, count)
    if count % world_size:
        raise ValueError(f"{name} is {count}; it must be a multiple of {world_size}")
    return count // world_size


def _check_sms(num_sms: int) -> None:
    if type(num_sms) is not int or num_sms < _CLUSTER:
        raise ValueError(f"num_sms is {num_sms!r}; expected an integer of at least {_CLUSTER}")


def _check_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a positive integer")


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
