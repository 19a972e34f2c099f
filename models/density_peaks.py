"""DPC-KNN: clusters of tokens around peaks of their density, without a matrix of all pairs of many tokens.

Distances of all pairs are looked at once, block by block, for the nearest neighbours of each token. These settle most
of what follows: whoever has a denser neighbour, or a center among the neighbours, has found the nearest one. Only the
others, a twentieth to a third of the tokens of a photo, are compared with all tokens, or all centers, again.

Source: Du et al. 2016 and the official code of TCFormer (github.com/zengwang430521/TCFormer @1ea72a8).
Differs: distances are squared until they are reported; nothing is drawn at random.
Deliberately absent: gradients through the clustering.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from models.token_merging import take_tokens

NOISE_SCALE = 1e-6  # official code, `cluster_dpc_knn`
SPLIT_FROM = 4096  # tokens from which a program makes no matrix of all pairs, whatever the picture
MAX_ROWS = 512  # tokens that are compared with all others at once: what is made of their pairs stays in the cache
MAX_PAIRS = 1 << 23  # pairs of tokens that are compared at once


class DensityPeaks(NamedTuple):
    """Result of `dpc_knn`.

    Attributes:
        clusters: (B, N) int64 in [0, C).
        centers: (B, C) int64, token in the middle of each cluster, highest score first; center c is in cluster c.
        nearest: (B, N, K) distances to the nearest neighbours, the token itself included, rising up to rounding.
        density: (B, N), in [0, 1] without noise.
        scores: (B, N), density times the distance to the next denser token.
    """

    clusters: Tensor
    centers: Tensor
    nearest: Tensor
    density: Tensor
    scores: Tensor


class _Neighbors(NamedTuple):
    """Nearest neighbours of each token, and the largest distance of any pair.

    Attributes:
        squares: (B, N, K) squared distances.
        indices: (B, N, K) int64, of tokens.
        farthest: (B, 1), squared.
    """

    squares: Tensor
    indices: Tensor
    farthest: Tensor


class _Pairs(NamedTuple):
    """What squared distances of tokens to others are made from.

    Attributes:
        x: (B, N, E).
        rows, columns: (B, N, E + 2), whose products are squared distances.
        is_neighbor: (B, N) bool, or None.
        hidden: (B, 1, 1), the squared distance to who is no neighbour, or None.
    """

    x: Tensor
    rows: Tensor
    columns: Tensor
    is_neighbor: Tensor | None
    hidden: Tensor | None

    def squares(self, rows: Tensor) -> Tensor:
        """Compare some rows (B, M, E + 2) with all tokens: (B, M, N).

        Distances to oneself are rounding noise around 0, negative too.
        """
        squares = rows @ self.columns.mT
        if self.is_neighbor is None or self.hidden is None:
            return squares
        return torch.where(self.is_neighbor[:, None], squares, self.hidden)


def dpc_knn(
    x: Tensor,
    *,
    num_clusters: int,
    num_neighbors: int = 5,
    is_neighbor: Tensor | None = None,
    is_real: Tensor | None = None,
    noise: Tensor | None = None,
) -> DensityPeaks:
    """Cluster tokens around density peaks: dense tokens far from denser ones become centers, the others join them.

    Always in float32 or wider, and without gradient. Distances are Euclidean, divided by √E. At most `MAX_PAIRS` of
    them are held at once (in a program of less than `SPLIT_FROM` tokens, as many as there are in doubt).

    Args:
        x: (B, N, E).
        num_clusters: C ≤ N.
        num_neighbors: K; a token counts among its own neighbours; N where there are fewer.
        is_neighbor: (B, N) bool; the other tokens are farther from everybody than any pair is and join cluster 0.
        is_real: (B, N) bool; the others have no density, so that they are centers last.
        noise: (B, N) in [0, 1), breaks ties of density as the official code does; for parity only.
    Returns: clusters and what they were made from; equal scores, and equal distances, go to the lower index.
    Source: official code, `cluster_dpc_knn`. Differs: "farther than any pair" looks at the pairs of the sample, not of
        the whole batch; this only shows in the score of a sample's densest token, which is the first center anyway.
    """
    with torch.no_grad(), _full_precision(x.device.type):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        E = x.shape[2]
        pairs = _prepare_pairs(x - x.mean(dim=1, keepdim=True), is_neighbor)  # near the origin rounding loses less
        found = _find_neighbors(pairs, min(num_neighbors, x.shape[1]))
        crowding = (
            -found.squares.mean(dim=-1) / E
        )  # orders as the density, which is rounded to 1 where tokens are alike
        density = crowding.exp()
        if noise is not None:
            crowding = density = density + noise * NOISE_SCALE
        if is_real is not None:
            crowding, density = crowding.masked_fill(~is_real, -torch.inf), density * is_real

        separation = _separate(pairs, found, crowding)
        scores = (separation.clamp(min=0) / E).sqrt() * density
        centers = _highest(scores, num_clusters)
        clusters = _join(pairs, found, centers)
        return DensityPeaks(clusters, centers, (found.squares / E).sqrt(), density, scores)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """Keep autocast away: in half precision distances, and with them clusters, are others."""
    has_autocast = torch.amp.is_autocast_available(device_type)  # not so on the meta device
    return torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()


def _prepare_pairs(x: Tensor, is_neighbor: Tensor | None) -> _Pairs:
    """Prepare distances; tokens that are no neighbours stand 1 farther than the farthest pair of their sample."""
    norms = x.square().sum(dim=-1, keepdim=True)
    ones = torch.ones_like(norms)
    # One matrix product makes the squares whole: adding the norms later would pass over all pairs twice more.
    pairs = _Pairs(x, torch.cat((-2 * x, norms, ones), dim=-1), torch.cat((x, ones, norms), dim=-1), None, None)
    if is_neighbor is None:
        return pairs
    farthest = torch.stack([pairs.squares(pairs.rows[:, part]).amax(dim=(1, 2)) for part in _blocks(pairs)]).amax(dim=0)
    hidden = ((farthest / x.shape[2]).sqrt() + 1).square() * x.shape[2]
    return pairs._replace(is_neighbor=is_neighbor, hidden=hidden[:, None, None])


def _blocks(pairs: _Pairs) -> list[slice]:
    """Split the rows so that the pairs of a part are few."""
    N = pairs.rows.shape[1]
    step = max(min(MAX_PAIRS // N, MAX_ROWS), 1)
    return [slice(start, min(start + step, N)) for start in range(0, N, step)]


def _find_neighbors(pairs: _Pairs, num_neighbors: int) -> _Neighbors:
    """Compare all tokens with all others.

    Distances of the nearest are made from differences: a product of matrices rounds by as much as two tokens of one
    colour are apart, and every library in its own way. Clusters made of such numbers would be others in the exported
    program.
    """
    K = num_neighbors
    found = torch.cat([_find_in_block(pairs, part, K) for part in _blocks(pairs)], dim=1)
    return _Neighbors(found[..., :K], found[..., K:-1].long(), found[..., -1].amax(dim=1, keepdim=True))


def _find_in_block(pairs: _Pairs, part: slice, num_neighbors: int) -> Tensor:
    """Compare some rows with all tokens: (B, M, 2K + 1), squared distances and indices, then the largest of the row.

    In one tensor, indices too, which float32 holds exactly below 2²⁴: ONNX Runtime computes what the next step asks
    for, and would keep the pairs of all blocks until somebody asked for the largest distance.
    """
    squares = pairs.squares(pairs.rows[:, part])
    rounded, index = squares.topk(num_neighbors, largest=False)
    others = take_tokens(pairs.x, index.flatten(1)).unflatten(1, (-1, num_neighbors))  # (B, M, K, E)
    exact = (others - pairs.x[:, part, None]).square().sum(dim=-1)
    if pairs.is_neighbor is not None:
        exact = torch.where(_at_neighbors(pairs.is_neighbor, index), exact, rounded)
    return torch.cat((exact, index.to(exact.dtype), squares.amax(dim=-1, keepdim=True)), dim=-1)


def _at_neighbors(values: Tensor, index: Tensor) -> Tensor:
    """Read a value of each token at the neighbours of tokens: (B, N) and (B, M, K) → (B, M, K)."""
    return values.gather(1, index.flatten(1)).unflatten(1, (-1, index.shape[2]))


def _separate(pairs: _Pairs, found: _Neighbors, crowding: Tensor) -> Tensor:
    """Find the squared distance of each token to the nearest denser one, the farthest where none is: (B, N)."""
    is_denser = _at_neighbors(crowding, found.indices) > crowding[..., None]  # (B, N, K)
    separation = torch.where(is_denser, found.squares, torch.inf).amin(dim=-1)
    is_peak = ~is_denser.any(dim=-1)
    for some in _pick(is_peak, num_others=crowding.shape[1]):
        is_denser = crowding[:, None] > crowding.gather(1, some)[..., None]  # (B, M, N)
        squares = pairs.squares(take_tokens(pairs.rows, some))
        far = torch.where(is_denser, squares, found.farthest[..., None]).amin(dim=-1)
        known = torch.where(is_peak.gather(1, some), far, separation.gather(1, some))
        separation = separation.scatter(1, some, known)
    return separation


def _highest(scores: Tensor, count: int) -> Tensor:
    """Find the highest scores of each sample in falling order, equal ones in order of index: (B, count) int64."""
    if torch.compiler.is_exporting():  # ONNX, which has no stable sort, lets the lower index win; torch does not
        return scores.topk(count).indices
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _join(pairs: _Pairs, found: _Neighbors, centers: Tensor) -> Tensor:
    """Find the nearest center of each token: (B, N) int64."""
    (B, N), C = found.indices.shape[:2], centers.shape[1]
    numbers = torch.arange(C, device=centers.device).expand_as(centers)
    cluster_of_center = centers.new_full((B, N), C).scatter(1, centers, numbers)
    near = _at_neighbors(cluster_of_center, found.indices)  # (B, N, K), C where the neighbour is no center
    squares = torch.where(near < C, found.squares, torch.inf)
    closest = squares.amin(dim=-1, keepdim=True)
    clusters = torch.where(squares == closest, near, C - 1).amin(dim=-1)
    # A center as far as the last neighbour may have a twin that is none; a hidden one is near without being neighbour.
    is_open = (closest >= found.squares.amax(dim=-1, keepdim=True)).squeeze(-1)
    if pairs.is_neighbor is not None:
        is_open = torch.ones_like(is_open)
    middle = take_tokens(pairs.columns, centers).mT  # (B, E + 2, C)
    for some in _pick(is_open, num_others=C):
        joined = (take_tokens(pairs.rows, some) @ middle).argmin(dim=-1)
        joined = torch.where(is_open.gather(1, some), joined, clusters.gather(1, some))
        clusters = clusters.scatter(1, some, joined)
    if pairs.is_neighbor is not None:
        clusters = clusters * pairs.is_neighbor
    # A center whose twin ranks higher would join the twin and leave its own cluster empty.
    return clusters.scatter(1, centers, numbers)


def _pick(is_wanted: Tensor, *, num_others: int) -> tuple[Tensor, ...]:
    """List the wanted tokens of each sample, with others where a sample has fewer than its batch mates.

    Args:
        is_wanted: (B, N) bool.
        num_others: how many each of them will be compared with.
    Returns: indices (B, M) int64, in parts of at most `MAX_PAIRS` pairs.
    """
    B, N = is_wanted.shape
    step = max(MAX_PAIRS // num_others, 1)
    is_program = torch.compiler.is_exporting()
    if is_wanted.is_meta or (is_program and N >= SPLIT_FROM):  # their number is not known, or too large for one part
        return torch.arange(N, device=is_wanted.device).expand(B, N).split(step, dim=1)
    # Not `int`, which would have the exporter fix the number.
    most = cast("int", is_wanted.sum(dim=1).amax(dim=0).clamp(min=1).item())
    torch._check(most >= 1)  # noqa: SLF001 - the one way to tell the exporter what it cannot see
    torch._check(most <= N)  # noqa: SLF001 - as above
    index = is_wanted.float().topk(most).indices
    return (index,) if is_program else index.split(step, dim=1)
