"""The links to Colab and Binder: all from one setting, and each opens its own file."""

import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import nbformat
import pytest

from pruning101.course import cli, links, material

ROOT = Path(__file__).resolve().parents[2]
LESSONS = material.lessons(ROOT)
LINK = re.compile(r"\[([^][]+)\]\(([^)\s]+)\)")


def opened(address):
    """Which service, repository, branch and file an address opens, read without our patterns."""
    parts = urlsplit(address)
    path = unquote(parts.path).strip("/").split("/")
    if parts.netloc == "colab.research.google.com":
        assert path[0] == "github"
        assert path[3] == "blob"
        return "Colab", "/".join(path[1:3]), path[4], "/".join(path[5:])
    assert parts.netloc == "mybinder.org", address
    assert path[:2] == ["v2", "gh"]
    (tree,) = parse_qs(parts.query)["urlpath"]
    assert tree.startswith("lab/tree/")
    return "Binder", "/".join(path[2:4]), path[4], tree.removeprefix("lab/tree/")


def wanted(name, root=ROOT):
    """What the links of a lesson open, by their words."""
    place = links.home(root)
    lesson, exercises = f"notebooks/{name}.ipynb", f"notebooks/exercises/{name}.ipynb"
    return {
        ("Colab", place.repository, place.branch, lesson),
        ("Colab", place.repository, place.branch, exercises),
        ("Binder", place.repository, place.branch, lesson),
        ("Binder", place.repository, place.branch, exercises),
    }


def fits(words, target):
    """Whether the words of a link say what it opens."""
    service, _, _, path = target
    return service in words and ("exercises" in words.lower()) == ("/exercises/" in path)


@pytest.fixture
def course(built):
    """The tiny course with a setting of its own, a README and a citation."""
    (built / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/pruning101/pruning101"\n'
        '[tool.pruning101]\nbranch = "main"\n'
    )
    (built / "README.md").write_text(
        "# Tiny\n\n| | lesson | open |\n|---|---|---|\n"
        "| 7 | [Tiny](notebooks/07_tiny.ipynb) is tiny |\n\n"
        "See https://github.com/pruning101/pruning101/issues and "
        "https://github.com/somebody/pruning.\n"
    )
    (built / "CITATION.cff").write_text(
        'repository-code: "https://github.com/pruning101/pruning101"\n'
    )
    (built / "book").mkdir()
    (built / "book" / "guide.md").write_text(
        "`git clone https://github.com/pruning101/pruning101.git`, or\n"
        "https://hub.example.org/hub/user-redirect/git-pull"
        "?repo=https%3A%2F%2Fgithub.com%2Fpruning101%2Fpruning101&branch=main"
        "&urlpath=lab%2Ftree%2Fpruning101%2Fnotebooks%2Findex.ipynb\n"
    )
    assert cli.main(["links"]) == 0
    return built


def move(course, repository, branch):
    text = (course / "pyproject.toml").read_text()
    text = text.replace("pruning101/pruning101", repository).replace('"main"', f'"{branch}"')
    (course / "pyproject.toml").write_text(text)


def test_no_file_of_the_course_names_another_repository_or_branch():
    assert list(links.faults(ROOT)) == []
    place, seen = links.home(ROOT), 0
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ("tests", "runs") or any(part.startswith((".", "_build")) for part in parts):
            continue
        if path.suffix not in (".ipynb", ".py", ".md", ".cff", ".toml", ".yml", ".txt", ".rst"):
            continue
        text = path.read_text(encoding="utf-8")
        start = r"https://(?:colab\.research\.google\.com/github|mybinder\.org/v2/gh)/"
        for address in re.findall(start + r"[^\s)\"\\<>{}]+", text):
            _, repository, branch, file = opened(address)
            assert (repository, branch) == (place.repository, place.branch), path
            assert (ROOT / file).is_file(), path
            seen += 1
    assert seen >= 12 * len(LESSONS)  # four in each notebook, its student version, and the README


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_each_link_of_a_notebook_opens_its_own_file(lesson):
    tops = []
    for path in (lesson.notebook, lesson.exercises):
        first = nbformat.read(path, as_version=4).cells[0].source
        tops.append(first)
        line = first.split("\n\n")[1]
        ours = [(m[1], opened(m[2])) for m in LINK.finditer(line)]
        assert {target for _, target in ours} == wanted(lesson.name)
        assert all(fits(words, target) for words, target in ours)
        assert all((ROOT / target[3]).is_file() for _, target in ours)
        title, _, below = first.partition("\n\n")
        assert title.startswith("# ")
        assert below.startswith("[Open in Colab](")
    assert tops[0] == tops[1]


def test_each_badge_of_the_readme_opens_its_own_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    addresses = dict(re.findall(r"^\[([\w-]+)\]: (\S+)$", text, re.MULTILINE))
    for lesson in LESSONS:
        (row,) = re.findall(rf"^\| {int(lesson.number)} \|.*$", text, re.MULTILINE)
        badges = re.findall(r"\[!\[([^]]+)\]\[(\w+)\]\]\[([\w-]+)\]", row)
        targets = [(words, opened(addresses[key])) for words, _, key in badges]
        assert {target for _, target in targets} == wanted(lesson.name)
        assert len(targets) == 4
        assert all(fits(words, target) for words, target in targets)
        assert all(re.search(rf"\b{int(lesson.number)}\b", words) for words, _ in targets)
        assert [image for _, image, _ in badges] == [target[0].lower() for _, target in targets]
        assert all(addresses[image].endswith(".svg") for _, image, _ in badges)


def test_links_follow_the_setting_everywhere(course):
    move(course, "someone-else/pruning-2027", "v1.0")
    assert list(links.faults(course)) != []
    assert cli.main(["links"]) == 0
    assert list(links.faults(course)) == []
    for path in course.rglob("*"):
        if path.suffix in (".ipynb", ".md", ".cff"):
            text = path.read_text()
            assert "pruning101/pruning101" not in text, path.name
            assert "pruning101%2Fpruning101" not in text, path.name
            assert "main" not in re.findall(r"/blob/([^/]+)|&branch=(\w+)", text), path.name
    readme = (course / "README.md").read_text()
    assert "https://github.com/someone-else/pruning-2027/issues" in readme
    assert "https://github.com/somebody/pruning." in readme, "another's repository stays"
    guide = (course / "book" / "guide.md").read_text()
    assert "git clone https://github.com/someone-else/pruning-2027.git`" in guide
    pull = "repo=https%3A%2F%2Fgithub.com%2Fsomeone-else%2Fpruning-2027&branch=v1.0&urlpath="
    assert f"{pull}lab%2Ftree%2Fpruning-2027%2Fnotebooks%2Findex.ipynb" in guide
    top = nbformat.read(course / "notebooks" / "07_tiny.ipynb", as_version=4).cells[0].source
    found = {opened(m[2]) for m in LINK.finditer(top)}
    assert found == wanted("07_tiny", course)


def test_links_written_twice_are_the_same(course):
    before = {path: path.read_bytes() for path in course.rglob("*") if path.is_file()}
    assert cli.main(["links"]) == 0
    assert {path: path.read_bytes() for path in course.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("where", "old", "new", "told"),
    [
        ("notebooks/07_tiny.ipynb", "blob/main/", "blob/other/", "branch main"),
        (
            "notebooks/exercises/07_tiny.ipynb",
            "gh/pruning101/",
            "gh/fork/",
            "is not in pruning101/",
        ),
        ("notebooks/07_tiny.ipynb", "blob/main/notebooks/exercises", "blob/main/notebooks", "own"),
        ("notebooks/index.ipynb", "The course on Binder", "The course", "its own links"),
        ("README.md", "[07-colab]: https://colab", "[07-x]: https://colab", "not those that"),
        ("README.md", "(notebooks/07_tiny.ipynb)", "(notebooks/07.ipynb)", "no row"),
        ("README.md", "main/notebooks/exercises/", "main/notebooks/", "not those that"),
        ("CITATION.cff", "pruning101/pruning101", "fork/pruning101", "not those that"),
        ("book/guide.md", "&branch=main", "&branch=old", "branch main"),
    ],
)
def test_a_wrong_link_is_named(course, capsys, where, old, new, told):
    path = course / where
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert cli.main(["links", "--check"]) == 1
    out = capsys.readouterr().out
    assert where in out
    assert told in out


def test_a_lesson_whose_code_changed_keeps_the_others_from_nothing(course, capsys):
    move(course, "a/b", "main")
    source = course / "lessons" / "07_tiny.py"
    source.write_text(source.read_text().replace("np.arange(3)", "np.arange(4)"))
    assert cli.main(["links"]) == 1
    assert "`pruning101 build 07_tiny`" in capsys.readouterr().out
    assert "github/a/b/blob" in (course / "README.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("https://github.com/pruning101/pruning101", "pruning101", "write the address of a repo"),
        ("https://github.com/pruning101/pruning101", "https://github.com/x", "a repository"),
        ('branch = "main"', 'branch = "a b"', "write the name of a branch"),
        ('branch = "main"', "", "write the name of a branch"),
    ],
)
def test_a_wrong_setting_is_refused(course, old, new, told):
    path = course / "pyproject.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=told):
        links.home(course)


def test_without_a_setting_a_sentence_says_where_links_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "_CHECKOUT", tmp_path / "site-packages")
    with pytest.raises(FileNotFoundError, match="made in a checkout"):
        links.home(tmp_path)
