"""What a Secret's entries mean, and what becomes of files that change. No process, no clock."""

import contextlib
import gc
import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.router.volume import Volume
from typer.testing import CliRunner

from wherry_cli.keys import app
from wherry_protocol.http.auth import TokenGuard
from wherry_protocol.openai.errors import ApiError
from wherry_protocol.watched import Watched
from wherry_router.caller import Caller, LimitSet
from wherry_router.identity.gate import Gate, KeyFiles
from wherry_router.identity.keys import KeysError, KeySet, hash_of, new_key, read_keys
from wherry_router.identity.salt import Salts

KEY, OTHER = "wk-0123456789abcdef", "wk-fedcba9876543210"
HASH = hashlib.sha256(KEY.encode()).hexdigest()

GOOD = {
    "a key": ("team-a", KEY, Caller(tenant="team-a", key="team-a")),
    "with the newline of an editor": ("team-a", KEY + "\n", Caller(tenant="team-a", key="team-a")),
    "its hash": ("team-a", f"sha256:{HASH}\n", Caller(tenant="team-a", key="team-a")),
    "described": (
        "ci.yaml",
        f"key: {KEY}\ntenant: team-a\nweight: 2\npriorityClass: low\nlimits: {{tokensPerMinute: 7}}",
        Caller(tenant="team-a", key="ci", weight=2.0, priority_class="low", limits=LimitSet(tokens_per_minute=7)),
    ),
    "described by its hash, as JSON": (
        "x.json",
        f'{{"name": "ci", "sha256": "{HASH}"}}',
        Caller(tenant="ci", key="ci"),
    ),
    "one of several": (
        "all.yml",
        f"keys: [{{name: ci, key: {KEY}}}, {{name: cd, key: {OTHER}}}]",
        Caller(tenant="ci", key="ci"),
    ),
}


@pytest.mark.parametrize("name, content, caller", GOOD.values(), ids=GOOD)
def test_what_an_entry_means(name: str, content: str, caller: Caller) -> None:
    assert read_keys([(name, content.encode())]).find(hash_of(KEY)) == caller


BAD = {
    "short": ("a", b"wk-short", "16 to 512 characters"),
    "empty": ("a", b"\n", "either `key` or `sha256`"),
    "a key as the entry's name": (KEY, b"team-a", "called like a key"),
    "two lines": ("a", f"{KEY}\n{OTHER}".encode(), "without spaces"),
    "not text": ("a", b"\xff\xfe" * 20, "ASCII"),
    "hash too short": ("a", b"sha256:abc", "64 digits"),
    "hash in capitals": ("a", b"sha256:" + HASH.upper().encode(), "64 digits"),
    "both": ("a.yaml", f"key: {KEY}\nsha256: {HASH}".encode(), "either"),
    "not YAML": ("a.yaml", f"key: [{KEY}".encode(), "not YAML"),
    "a list": ("a.yaml", f"- {KEY}".encode(), "Expected `object`"),
    "unknown field": ("a.yaml", f"key: {KEY}\nweigth: 2".encode(), "`weigth`"),
    "a key where a field belongs": ("a.yaml", f"{KEY}: team-a".encode(), "not known"),
    "several, one without a name": ("a.yaml", f"keys: [{{key: {KEY}}}]".encode(), "name is 1 to 128"),
    "weight of nothing": ("a.yaml", f"key: {KEY}\nweight: 0".encode(), "`weight`"),
    "weight that is none": ("a.yaml", f"key: {KEY}\nweight: .nan".encode(), "`weight`"),
    "limit below nothing": ("a.yaml", f"key: {KEY}\nlimits: {{concurrent: -1}}".encode(), "below 0"),
    "tenant with a space": ("a.yaml", f"key: {KEY}\ntenant: a b".encode(), "`tenant`"),
    "the same key twice": ("a.yaml", f"keys: [{{name: x, key: {KEY}}}, {{name: y, sha256: {HASH}}}]".encode(), "same"),
    "the same name twice": (
        "a.yaml",
        f"keys: [{{name: x, key: {KEY}}}, {{name: x, key: {OTHER}}}]".encode(),
        "two keys",
    ),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_an_entry_that_cannot_be_used_spoils_the_set_and_is_never_quoted(
    name: str, content: bytes, message: str
) -> None:
    with pytest.raises(KeysError, match=message) as caught:
        read_keys([("good", b"wk-good-good-good-good"), (name, content)])
    text = str(caught.value)
    assert not any(secret in text for secret in (KEY, OTHER, HASH, "good-good")), text


ODD = [
    "key: 2001-99-99",
    "1: 2",
    "? [a]\n: b",
    "[" * 3000,
    "&a [*a]",
    "!!python/object/apply:os.system [x]",
    "weight: " + "9" * 5000,
    f"key: {KEY}\nlimits: {{tokensPerMinute: {10**30}}}",
    "keys: 7",
    "",
    "null",
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_files_are_refused_like_all_others(text: str) -> None:
    with pytest.raises(KeysError):
        read_keys([("a.yaml", text.encode())])


@given(st.sampled_from(["a", "a.yaml", "a.json", ""]), st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_file_ends_the_router(name: str, content: bytes) -> None:
    with contextlib.suppress(KeysError):
        read_keys([(name, content)])


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("wk-") and len(key) >= 40 for key in keys)


def test_the_command_prints_a_key_and_an_entry_that_knows_it() -> None:
    result = CliRunner().invoke(app, ["new", "ci", "--tenant", "team-a", "--tokens-per-minute", "1000"])
    assert result.exit_code == 0
    key = result.stdout.strip()
    head, _, entry = result.stderr.partition("  ci.yaml: |\n")
    assert "stringData:" in head
    assert key not in result.stderr
    keys = read_keys(
        [("ci.yaml", "\n".join(line.strip() for line in entry.splitlines()).replace("tokens", "  tokens").encode())]
    )
    assert keys.find(hash_of(key)) == Caller(tenant="team-a", key="ci", limits=LimitSet(tokens_per_minute=1000))


@pytest.mark.parametrize("arguments", [["a b"], ["a/b"], [""], ["a", "--weight", "-1"], ["a", "--tenant", "ü"]])
def test_the_command_makes_no_key_that_could_not_be_used(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["new", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""


def known(files: KeyFiles, *keys: str) -> list[bool]:
    return [files.keys.find(hash_of(key)) is not None for key in keys]


def looks(files: KeyFiles, count: int = 3) -> None:
    for _ in range(count):
        files.watched.look()


def test_keys_are_exchanged_while_the_router_runs(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "keys", a=KEY)
    files = KeyFiles(volume.path)
    assert known(files, KEY, OTHER) == [True, False]
    volume.put(a=OTHER)
    looks(files)
    assert known(files, KEY, OTHER) == [False, True]
    volume.put()
    looks(files)
    assert known(files, KEY, OTHER) == [False, False]
    assert files.unready() is None


def test_what_cannot_be_used_changes_nothing_until_it_can(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "keys", a=KEY)
    files = KeyFiles(volume.path)
    volume.put(a=OTHER, b="short")
    looks(files)
    assert known(files, KEY, OTHER) == [True, False]
    assert files.watched.problem
    volume.put(a=OTHER)
    looks(files)
    assert known(files, KEY, OTHER) == [False, True]
    assert files.watched.problem is None


def test_what_is_wrong_is_not_read_all_the_time(tmp_path: Path) -> None:
    """A set that cannot be used costs no more than one look in thirty; a change of it is seen at once."""
    reads: list[str] = []

    def load() -> str:
        reads.append((tmp_path / "file").read_text())
        if reads[-1] == "wrong":
            raise KeysError("wrong")
        return reads[-1]

    used: list[str] = []
    (tmp_path / "file").write_text("wrong")
    watched = Watched("keys", [tmp_path / "file"], load, used.append, (KeysError,))
    watched.start()
    for _ in range(91):
        watched.look()
    assert (len(reads), watched.problem) == (4, "wrong")
    (tmp_path / "file").write_text("right")
    watched.look()
    watched.look()
    assert (used, watched.problem) == (["right"], None)


def test_a_file_is_not_read_while_somebody_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"keys: [{{name: a, key: {KEY}}}]")
    files = KeyFiles(path)
    for end in range(0, 40, 10):
        # Each of these pieces is a set of keys, or none; none of them is what somebody wanted.
        path.write_text(f"keys: []\n#{'x' * end}")
        files.watched.look()
        assert known(files, KEY) == [True]
    path.write_text(f"keys: [{{name: a, key: {OTHER}}}]")
    looks(files)
    assert known(files, KEY, OTHER) == [False, True]


def reachable(root: object) -> Iterator[object]:
    """Everything that `root` holds, however deep; not what programs hold: modules, classes, functions."""
    seen: set[int] = set()
    left = [root]
    while left:
        item = left.pop()
        if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
            continue
        seen.add(id(item))
        yield item
        left += gc.get_referents(item)


def test_of_a_key_nothing_is_kept_but_its_hash(tmp_path: Path) -> None:
    Volume(tmp_path / "keys", a=KEY, **{"b.yaml": f"key: {OTHER}"})
    gate = Gate(frozenset(), "wk-single-0123456789", KeyFiles(tmp_path / "keys"))
    held = [item for item in reachable(gate) if isinstance(item, str | bytes)]
    assert hash_of(KEY) in held
    secrets = (KEY, OTHER, "wk-single-0123456789")
    assert not [x for x in held if any(s in (x if isinstance(x, str) else x.decode("latin-1")) for s in secrets)]


def test_keys_that_come_later_open_the_door_then(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path / "keys")
    assert "cannot be used" in (files.unready() or "")
    looks(files)
    assert known(files, KEY) == [False]
    Volume(tmp_path / "keys", a=KEY)
    looks(files)
    assert files.unready() is None
    assert known(files, KEY) == [True]


def test_a_salt_is_the_same_for_a_tenant_everywhere_and_tells_nothing() -> None:
    one, same, other = Salts("token"), Salts("token"), Salts("another token")
    assert one.of("team-a") == same.of("team-a") != one.of("team-b")
    assert one.of("team-a") != other.of("team-a")
    assert one.of("") == ""
    assert "team-a" not in one.of("team-a")


async def test_a_key_is_looked_up_by_its_hash_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is compared with anything is a hash of what was sent, so no comparison's time depends on a key."""
    compared: list[bytes] = []
    find, compare = KeySet.find, hmac.compare_digest
    monkeypatch.setattr(KeySet, "find", lambda keys, digest: compared.append(digest) or find(keys, digest))
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(a) or compare(a, b))
    gate, guard = Gate(frozenset(), KEY), TokenGuard(OTHER, frozenset())
    sent = [KEY, KEY[:-1], KEY[:-1] + "x", "x" + KEY[1:], "x"]
    for key in sent:
        scope = {"raw_path": b"/", "headers": [(b"authorization", b"Bearer " + key.encode())]}
        with contextlib.nullcontext() if key == KEY else pytest.raises(ApiError):
            await gate.identify(scope)
        assert not guard.allows(scope)
    assert set(compared) == {hashlib.sha256(key.encode()).digest() for key in sent}
