import pytest

from trainer.estimate.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5 TiB", 3 * 2**39),
        ("512mib", 2**29),
        ("7B", 7),
    ],
)
def test_an_amount_is_read_in_its_own_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "GiB", "24 Gi", "-1GiB", "0GiB", "1e9B", "nanGiB"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match="no amount of memory such as 24GiB"):
        parse_size(text)
