"""How the entries of an axis lie, and the axes of heads."""

from auxin.words.roles import Axes, Segment, laid_out, per_head
from auxin.words.widths import Sizes


def test_segments_lie_one_after_the_other():
    segments = (Segment("query", 2, 4), Segment("key_value", 2, 2))
    assert laid_out(segments, [4, 2], [2, 2]) == list(range(12))


def test_dealt_segments_lie_by_key_value_heads():
    segments = tuple(
        Segment(stream, 2, count, (part,), dealt=True)
        for stream, count, part in (("query", 4, "query"), ("key_value", 2, "key"), ("key_value", 2, "value"))
    )
    # Queries of the first head (two), its key, its value; then those of the second.
    assert laid_out(segments, [4, 2, 2], [2, 2, 2]) == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    assert laid_out(segments, [6, 3, 3], [1, 1, 1]) == [0, 1, 6, 9, 2, 3, 7, 10, 4, 5, 8, 11]


def test_parts_have_the_head_dimension_or_sizes_of_their_own():
    assert Segment("query", 6, 4, ("query", "key", "value")).sizes_of_parts == (2, 2, 2)
    assert Segment("query", 5, 4, ("key", "value"), (3, 2)).sizes_of_parts == (3, 2)
    assert Segment("ffn", 1, 12).sizes_of_parts == ()


def test_fused_heads_and_single_entries_of_heads():
    axes = Axes.of(Sizes(residual=12, query_heads=4, key_value_heads=2, head_dim=3, ffn=None), vocabulary=7)
    assert axes.fused == (Segment("query", 9, 4, ("query", "key", "value")),)
    assert per_head(axes.query) == (Segment("query", 1, 4),)
    assert per_head(axes.key) == (Segment("key_value", 1, 2),)
