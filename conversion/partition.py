"""Partitions of an FFN's neurons into sets of equal size, and the balanced k-means behind one of them.

Shape letters: n points, d dimensions, C clusters, I FFN width, H hidden size, P = 2 if gated else 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ITERATIONS = 20


def balanced_kmeans(points: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """k-means whose clusters hold at most ceil(n / C) points each; equal ones if C divides n.

    Lloyd's iterations from centres drawn as in k-means++; the labels of the smallest sum of squared distances are
    kept. Points find their clusters in rounds: those without one ask the nearest that has room, and a cluster that is
    asked by too many takes the nearest of them.

    Args:
        points: float [n, d], n >= C.
        clusters: C.
        generator: on the CPU; it decides the first centres, and nothing else is random.

    Returns:
        Labels int64 [n] and the clusters' means float32 [C, d].
    """
    points = points.float()
    centres = _first_centres(points, clusters, generator)
    best, best_cost = points.new_zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(_ITERATIONS):
        distances = _squared_distances(points, centres)
        labels = _assign(distances, -(-len(points) // clusters))
        cost = distances.gather(1, labels[:, None]).double().sum().item()
        if cost >= best_cost:
            break
        best, best_cost = labels, cost
        centres = _means(points, labels, clusters)
    return best, _means(points, best, clusters)


def _first_centres(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres of k-means++: each next one a point drawn by its squared distance to the nearest centre so far."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    while len(chosen) < clusters:
        weight = _squared_distances(points, points[chosen]).amin(1).cpu().double()
        weight[chosen] = 0
        if not weight.any():
            # The rest are copies of centres; any of them will do.
            weight = torch.ones_like(weight)
            weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
    return points[chosen]


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """[n, d] and [C, d] -> [n, C], without a tensor [n, C, d]; finite, as what is full has to be further away."""
    squares = points.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * points @ centres.t()).clamp(min=0).nan_to_num(nan=torch.finfo(torch.float32).max)


def _assign(distances: Tensor, capacity: int) -> Tensor:
    """Labels int64 [n] from distances [n, C], at most `capacity` per cluster."""
    count, clusters = distances.shape
    labels = torch.full((count,), -1, dtype=torch.int64, device=distances.device)
    room = [capacity] * clusters
    while bool((labels < 0).any()):
        full = torch.tensor([free == 0 for free in room], device=distances.device)
        free = (labels < 0).nonzero()[:, 0]
        wanted = distances[free].masked_fill(full, torch.inf).argmin(1)
        for cluster in range(clusters):
            asking = free[wanted == cluster]
            nearest = distances[asking, cluster].argsort(stable=True)[: room[cluster]]
            labels[asking[nearest]] = cluster
            room[cluster] -= len(nearest)
    return labels


def _means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Mean of each cluster's points, [C, d]; zeros for one without points."""
    sums = points.new_zeros(clusters, points.shape[1]).index_add_(0, labels, points)
    return sums / labels.bincount(minlength=clusters).clamp(min=1)[:, None]


def _first(w_in: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    return torch.arange(w_in.shape[1]).view(parts, -1)


def _random(w_in: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(w_in.shape[1], generator=generator).view(parts, -1)


def _kmeans(w_in: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    rows = torch.nn.functional.normalize(w_in.transpose(0, 1).flatten(1).float(), dim=-1)
    labels, _ = balanced_kmeans(rows, parts, generator)
    return labels.argsort(stable=True).view(parts, -1).cpu()


#: Ways to part neurons: from in-projections [P, I, H], the number of sets, which divides I, and a generator, to int64
#: [sets, I / sets], each neuron once. In order; at random; by balanced k-means on the neurons' in-rows, gate and up one
#: after the other, with unit L2 norm (LLaMA-MoE).
PARTITIONS: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "first": _first,
    "random": _random,
    "kmeans": _kmeans,
}
