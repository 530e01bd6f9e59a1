from yunque.data.groups import commonest_groups, label_groups, label_lengths, length_limits

TOPICS = ["shopping", "weather", "shopping", " shopping ", "job", "weather", "bank"]


def test_the_commonest_values_are_groups_and_the_rest_one_more():
    names = commonest_groups(TOPICS, 2)
    assert names == ["shopping", "weather"]
    assert label_groups([*TOPICS, "new"], names) == [
        *("shopping", "weather", "shopping", "shopping", "other", "weather", "other", "other")
    ]


def test_ties_are_settled_by_name_not_by_order():
    assert commonest_groups(["b", "a", "c"], 2) == commonest_groups(["c", "b", "a"], 2) == ["a", "b"]


def test_length_bands_hold_about_equally_many_rows():
    lengths = [5, 90, 10, 40, 60, 20, 30, 70]
    limits = length_limits(lengths, 4)
    bands = label_lengths(lengths, limits)
    assert sorted({band: bands.count(band) for band in bands}.values()) == [2, 2, 2, 2]
    assert set(bands) == {"1-10 tokens", "11-30 tokens", "31-60 tokens", "61+ tokens"}
    assert label_lengths([1, 10, 11, 1000], limits) == ["1-10 tokens", "1-10 tokens", "11-30 tokens", "61+ tokens"]


def test_equal_lengths_make_fewer_bands():
    assert length_limits([7] * 10, 4) == [7]
    assert label_lengths([7, 8], [7]) == ["1-7 tokens", "8+ tokens"]
