import pytest

from tools.check_commit_message import main, problems


@pytest.mark.parametrize(
    "subject",
    [
        "queue: return suspects one by one",
        "docs: process the open points of decision 17",
        "api, client: focus on what a page returns",
        "webhooks/url_policy: embed the rule in the error",
        "fixup! the subject of another commit, which a rebase takes away",
    ],
)
def test_a_good_subject_passes(subject):
    assert problems(f"{subject}\n\nWhy.\n# Please enter the commit message\n") == []


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        ("", "area: verb"),
        ("The test of a card's width can fail", "area: verb"),
        ("Merge branch 'queue' into main", "area: verb"),
        ("queue: returned suspects one by one", "no imperative"),
        ("queue: returns suspects one by one", "no imperative"),
        ("queue: returning suspects one by one", "no imperative"),
        ("queue: Return suspects one by one", "no imperative"),
        ("queue: return suspects one by one.", "period"),
        ("queue: return suspects " + "one by one " * 5, "shorten it to 72"),
    ],
)
def test_a_bad_subject_says_why(subject, why):
    assert any(why in problem for problem in problems(subject.strip()))


def test_the_second_line_stays_empty():
    assert "line 2" in problems("queue: return suspects\nbecause they crash others")[0]


def test_the_hook_fails_with_the_problems_on_stderr(tmp_path, capsys):
    message = tmp_path / "COMMIT_EDITMSG"
    message.write_text("Update stuff")
    assert main([str(message)]) == 1
    assert "area: verb" in capsys.readouterr().err
    message.write_text("docs: describe the hook")
    assert main([str(message)]) == 0
