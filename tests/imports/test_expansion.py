"""Parameter sweeps: one row that expands to many jobs."""

import pytest

from darkroom.media_types import Format
from darkroom.status import Expand
from tests.support.import_rows import problems, read_jobs


def test_a_sweep_is_the_product_of_its_choices(registry):
    text = 'prompt,steps,seed\n"a {red|green} {cat|dog}, {really}",4|8,1\n'
    jobs = read_jobs(registry, text, expand=Expand.PRODUCT)

    assert [(row.prompt, row.num_inference_steps) for row in jobs] == [
        (f"a {color} {animal}, {{really}}", steps)
        for color in ("red", "green")
        for animal in ("cat", "dog")
        for steps in (4, 8)
    ]
    assert [row.image_number for row in jobs] == list(range(8))
    assert {(row.row_number, row.seed) for row in jobs} == {(1, 1)}


def test_zip_combines_choices_by_position(registry):
    jobs = read_jobs(registry, "prompt,seed\na {cat|dog},1|2\n", expand=Expand.ZIP)
    assert [(row.prompt, row.seed) for row in jobs] == [("a cat", 1), ("a dog", 2)]


def test_fields_that_are_not_swept_are_equal_even_a_random_seed(registry):
    jobs = read_jobs(registry, "prompt\na {cat|dog|cow}\n", expand=Expand.PRODUCT)
    assert len({row.seed for row in jobs}) == 1


def test_a_sweep_in_json_lists_its_numbers(registry):
    jobs = read_jobs(
        registry, '{"prompt": "a", "seed": [1, 2]}', Format.JSON_LINES, expand=Expand.PRODUCT
    )
    assert [row.seed for row in jobs] == [1, 2]


def test_nothing_is_expanded_by_default(registry):
    [row] = read_jobs(registry, "prompt\na {cat|dog}\n")

    assert row.prompt == "a {cat|dog}"
    assert problems(registry, "prompt,steps\na,4|8\n") == [
        (("row", 1, "num_inference_steps"), "not_a_number")
    ]


@pytest.mark.parametrize(
    ("row", "how", "code"),
    [
        ("{a|b},1|2|3", Expand.ZIP, "unequal_list_lengths"),
        ("{a|b},1|x", Expand.PRODUCT, "not_a_number"),
        ("{|},1", Expand.PRODUCT, "blank"),
        ("{a|b}" * 20 + ",1", Expand.PRODUCT, "too_many_variants"),
    ],
)
def test_an_invalid_sweep_is_refused(registry, row, how, code):
    found = problems(registry, f"prompt,seed\n{row}\n", expand=how)
    assert code in {code for _, code in found}


def test_the_jobs_of_one_row_are_limited(registry):
    text = "prompt,num_images\n" + "{a|b|c|d|e|f}" * 3 + ",100\n"
    [(loc, code)] = problems(registry, text, expand=Expand.PRODUCT)
    assert (loc[-1], code) == ("num_images", "too_many_jobs")
