"""Maximum matching in a general graph: Edmonds' blossom algorithm (Edmonds 1965, Paths, Trees, and Flowers).

A path from one free vertex to another that alternates between edges outside and inside the matching makes the matching
one edge larger; odd cycles on the way are contracted to their base. The kekulisation of aromatic systems asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence


def unmatched_vertex(neighbours: Sequence[Sequence[int]], vertices: Sequence[int]) -> int | None:
    """A vertex that a maximum matching leaves alone, None if the matching is perfect (Edmonds' blossom algorithm)."""
    mate = [-1] * len(neighbours)
    for vertex in vertices:  # a greedy start settles most molecules
        if mate[vertex] < 0:
            for other in neighbours[vertex]:
                if mate[other] < 0:
                    mate[vertex], mate[other] = other, vertex
                    break
    for vertex in vertices:
        if mate[vertex] < 0 and not _augment(neighbours, mate, vertex):
            return vertex
    return None


def _augment(neighbours: Sequence[Sequence[int]], mate: list[int], root: int) -> bool:
    """Grows an alternating tree from the free `root`, contracting odd cycles, and flips an augmenting path if any."""
    count = len(neighbours)
    parent, base, outer = [-1] * count, list(range(count)), [False] * count
    outer[root] = True
    queue = [root]

    def common_base(first: int, second: int) -> int:
        seen: set[int] = set()
        vertex = base[first]
        while True:
            seen.add(vertex)
            if mate[vertex] < 0:
                break
            vertex = base[parent[mate[vertex]]]
        vertex = base[second]
        while vertex not in seen:
            vertex = base[parent[mate[vertex]]]
        return vertex

    def mark_path(vertex: int, to: int, child: int, blossom: set[int]) -> None:
        while base[vertex] != to:
            blossom.update((base[vertex], base[mate[vertex]]))
            parent[vertex] = child
            child = mate[vertex]
            vertex = parent[child]

    for vertex in queue:  # grows while it is read
        for other in neighbours[vertex]:
            if base[vertex] == base[other] or mate[vertex] == other:
                continue
            if other == root or (mate[other] >= 0 and parent[mate[other]] >= 0):
                stem = common_base(vertex, other)
                blossom: set[int] = set()
                mark_path(vertex, stem, other, blossom)
                mark_path(other, stem, vertex, blossom)
                for member in range(count):
                    if base[member] in blossom:
                        base[member] = stem
                        if not outer[member]:
                            outer[member] = True
                            queue.append(member)
            elif parent[other] < 0:
                parent[other] = vertex
                if mate[other] < 0:
                    free: int = other
                    while free >= 0:
                        previous = parent[free]
                        following = mate[previous]
                        mate[free], mate[previous] = previous, free
                        free = following
                    return True
                outer[mate[other]] = True
                queue.append(mate[other])
    return False
