"""YAML's merge keys (``<<``), in nodes that are read but never constructed. https://yaml.org/type/merge.html"""

from collections.abc import Iterator

import yaml

MERGE = "tag:yaml.org,2002:merge"
Pair = tuple[yaml.Node, yaml.Node]


class MergeError(ValueError):
    """A merge key whose value cannot be merged; ``line`` is its line number, from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def merged_pairs(node: yaml.MappingNode) -> list[Pair]:
    """Return the keys and values of a mapping: first its own, then those that its merge key adds.

    A mapping's own key wins over a merged one, and an earlier mapping in a list over a later one. A key that one
    mapping has twice stays twice. MergeError if a merged value is not a mapping, or if a mapping merges itself.
    """
    return _pairs(node, {}, ())


def _pairs(node: yaml.MappingNode, known: dict[int, list[Pair]], above: tuple[int, ...]) -> list[Pair]:
    if id(node) in known:
        # Every mapping is merged once, however many aliases lead to it.
        return known[id(node)]
    own = [pair for pair in node.value if pair[0].tag != MERGE]
    names = {_name(key) for key, _ in own}
    merges = [pair for pair in node.value if pair[0].tag == MERGE]
    if len(merges) > 1:
        line = merges[0][0].start_mark.line + 1
        raise MergeError(f"<<: set twice, first on line {line}; list the mappings", merges[1][0].start_mark.line + 1)
    for key, value in merges:
        line = key.start_mark.line + 1
        for part in _parts(value, line):
            if id(part) in (*above, id(node)):
                raise MergeError("<<: merges itself", line)
            own += [pair for pair in _pairs(part, known, (*above, id(node))) if _name(pair[0]) not in names]
            names = {_name(key) for key, _ in own}
    known[id(node)] = own
    return own


def _parts(value: yaml.Node, line: int) -> Iterator[yaml.MappingNode]:
    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
        if not isinstance(part, yaml.MappingNode):
            raise MergeError("<<: expected a section of keys, or a list of them, to merge", line)
        yield part


def _name(key: yaml.Node) -> tuple[str, object]:
    """Return a value that is equal for equal keys."""
    return key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)
