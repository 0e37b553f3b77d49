"""engine/wire.py and backends/cuda/messages.py: what goes in comes out; what a stranger or a broken peer sends is refused."""

import socket
import threading
from contextlib import closing
from dataclasses import fields, is_dataclass
from time import monotonic

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from backends.cuda import messages
from backends.cuda.messages import (
    BIAS,
    DTYPES,
    HISTORY,
    OFF,
    STEP,
    Allocate,
    Close,
    Failed,
    Join,
    Load,
    Loaded,
    Packed,
    Pages,
    Ready,
    Step,
    decode_answer,
    decode_join,
    decode_order,
    encode,
    for_followers,
    pack_step,
    unpack_step,
)
from engine import wire
from engine.backend import LoadOptions, MemoryStatistics
from engine.step import Bias, History, StepInput
from engine.wire import Connection, Listener, WireError, connect, new_secret

TIMEOUT_S = 20


@pytest.fixture
def pair():
    """Two ends of one connection."""
    ours, theirs = socket.socketpair()
    with closing(Connection(ours, most_bytes=1 << 20)) as one, closing(Connection(theirs, most_bytes=1 << 20)) as other:
        yield one, other


@pytest.fixture
def raw():
    """A connection, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    with closing(Connection(ours, most_bytes=1 << 20)) as one, theirs:
        yield one, theirs


# ---- frames -----------------------------------------------------------------------------------------------------------


def test_frames_of_every_size_arrive_whole_and_in_order(pair):
    one, other = pair
    sent = [bytes([n % 251]) * n for n in (1, 2, 4, 1 << 16, (1 << 16) + 1, 1 << 20)]
    sender = threading.Thread(target=lambda: [one.send(frame[:1], frame[1:]) for frame in sent])
    sender.start()
    assert [bytes(other.receive(wait_s=TIMEOUT_S)) for _ in sent] == sent
    sender.join()


@pytest.mark.parametrize("size", [0, (1 << 20) + 1, 0xFFFFFFFF])
def test_a_frame_that_is_too_long_or_empty_is_refused_before_its_bytes_are_read(raw, size):
    one, theirs = raw
    theirs.sendall(wire.LENGTH.pack(size))
    with pytest.raises(WireError, match=f"a frame of {size:,} bytes comes in"):
        one.receive(wait_s=TIMEOUT_S)
    assert theirs.recv(1) == b""


def test_a_frame_that_is_too_long_is_not_sent_either(pair):
    with pytest.raises(WireError, match="is not sent"):
        pair[0].send(bytes((1 << 20) + 1))


@pytest.mark.parametrize("sent", [b"", b"\5", b"\5\0\0\0", b"\5\0\0\0abcd"])
def test_a_frame_that_is_cut_off_is_an_error(raw, sent):
    one, theirs = raw
    theirs.sendall(sent)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError, match="the other side closed it"):
        one.receive(wait_s=TIMEOUT_S)


@pytest.mark.parametrize("sent", [b"\5", b"\5\0\0\0abcd"])
def test_a_frame_that_comes_too_slowly_is_an_error_within_its_deadline(raw, sent):
    one, theirs = raw
    theirs.sendall(sent)
    began = monotonic()
    with pytest.raises(WireError, match="is silent for too long"):
        one.receive(wait_s=TIMEOUT_S, rest_s=0.05)
    assert monotonic() - began < TIMEOUT_S
    with pytest.raises(WireError, match="gone"):
        one.receive(wait_s=TIMEOUT_S)


def test_who_takes_nothing_does_not_block_the_sender_for_ever(raw):
    one, _ = raw
    with pytest.raises(WireError, match="takes nothing for too long"):
        one.send(bytes(1 << 20), timeout_s=0.05)


def test_close_from_another_thread_ends_a_wait(pair):
    one, _ = pair
    waiting, problems = threading.Event(), []

    def wait():
        waiting.set()
        try:
            one.receive()
        except WireError as error:
            problems.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(TIMEOUT_S)
    one.close()
    one.close()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive()
    assert problems


# ---- strangers --------------------------------------------------------------------------------------------------------


def test_both_sides_show_that_they_know_the_secret():
    secret = new_secret()
    with (
        closing(Listener(secret)) as listener,
        closing(connect(listener.port, secret)) as one,
        closing(listener.accept(TIMEOUT_S)) as other,
    ):
        one.send(b"hello")
        assert other.receive(wait_s=TIMEOUT_S) == b"hello"


def test_strangers_are_turned_away_and_hold_nobody_up(caplog):
    secret = new_secret()
    with closing(Listener(secret)) as listener, socket.create_connection((wire.HOST, listener.port)):     # which is silent
        with pytest.raises(WireError):
            connect(listener.port, new_secret())
        with socket.create_connection((wire.HOST, listener.port)) as odd:
            odd.sendall(b"GET / HTTP/1.1\r\n".ljust(len(wire.MAGIC) + wire.HALF))     # as long as a greeting
            assert odd.recv(1) == b""
        with closing(connect(listener.port, secret)) as one, closing(listener.accept(TIMEOUT_S)) as other:
            one.send(b"x")
            assert other.receive(wait_s=TIMEOUT_S) == b"x"
        with pytest.raises(WireError, match="nobody connected"):
            listener.accept(0.01)
    assert "without the secret" in caplog.text
    assert secret.hex() not in caplog.text


def test_a_listener_that_does_not_know_the_secret_is_refused():
    secret = new_secret()
    with socket.create_server((wire.HOST, 0)) as server:
        def pretend():
            sock, _ = server.accept()
            with sock:
                sock.recv(1 << 10)
                sock.sendall(bytes(wire.HALF))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(WireError, match="does not know the secret"):
            connect(server.getsockname()[1], secret)
        thread.join()


def test_where_nobody_listens_is_an_error():
    with socket.create_server((wire.HOST, 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(WireError, match=f"nobody listens at port {port}"):
        connect(port, new_secret())


# ---- messages ---------------------------------------------------------------------------------------------------------

OPTIONS = LoadOptions(device_ids=(0, 3), checkpoint="/a/b.gguf", fp8_kvcache=True)
ORDERS = [Load(OPTIONS, "0f"), Allocate(None), Allocate(5), Close()]
ANSWERS = [Ready("H100"), Loaded(MemoryStatistics(1, 2, 3)), Pages(7, MemoryStatistics(0, 1 << 40, 0)), Failed("E", "text ü")]


@pytest.mark.parametrize("message", ORDERS)
def test_orders_come_back_as_they_were(message):
    assert decode_order(encode(message)) == message


@pytest.mark.parametrize("message", ANSWERS)
def test_answers_come_back_as_they_were(message):
    assert decode_answer(encode(message)) == message


def array_of(draw, dtype, shape):
    return draw(arrays(dtype, shape))


@st.composite
def steps(draw):
    sizes = {letter: draw(st.integers(0, 4)) for letter in "CTBWSGVHXY"}
    sizes |= {letter + "1": sizes[letter] + 1 for letter in "SB"}

    def make(kind, names):
        shapes = {name: tuple(sizes.get(size, size) for size in shape) for name, shape in names.items()}
        return {name: array_of(draw, DTYPES[kind][name].newbyteorder("="), shape) for name, shape in shapes.items()}

    history = History(**make(History, HISTORY)) if draw(st.booleans()) else None
    bias = Bias(**make(Bias, BIAS)) if draw(st.booleans()) else None
    return StepInput(**make(StepInput, STEP), history=history, bias=bias)


def assert_same(one, other):
    assert type(one) is type(other)
    if is_dataclass(one):
        for field in fields(one):
            assert_same(getattr(one, field.name), getattr(other, field.name))
    elif one is not None:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


@settings(max_examples=25)
@given(steps())
def test_a_step_comes_back_bit_for_bit(step):
    back = decode_order(encode(pack_step(step)))
    assert isinstance(back, Step)
    assert_same(unpack_step(back), step)


@settings(max_examples=25)
@given(steps())
def test_followers_get_all_but_what_only_the_sampler_reads(step):
    cut = for_followers(step)
    assert cut.history is None
    assert cut.bias is None
    assert (cut.mask_at.size, cut.grammar_masks.size, cut.hidden_at.size) == (0, 0, 0)
    for name in STEP.keys() - OFF.keys() - {"mask_at", "grammar_masks", "hidden_at"}:
        assert getattr(cut, name) is getattr(step, name)
    for name, value in OFF.items():
        assert getattr(cut, name).tolist() == [value] * step.place_count
    unpack_step(pack_step(cut))


def a_step(**changes):
    shapes = {"C": 1, "T": 3, "B": 2, "W": 2, "S": 2, "G": 0, "V": 0, "H": 0, "B1": 3}
    made = {name: np.zeros([shapes.get(n, n) for n in shape], DTYPES[StepInput][name]) for name, shape in STEP.items()}
    return StepInput(**made | changes)


def packed(array):
    return Packed(array.dtype.str, array.shape, array.tobytes())


@pytest.mark.parametrize(("name", "wrong", "says"), [
    ("tokens", packed(np.zeros(3, np.int64)), "StepInput.tokens is of type '<i8', it must be <i4"),
    ("tokens", packed(np.zeros(3, np.uint32)), "of type '<u4'"),
    ("tokens", Packed("|O", (3,), bytes(24)), r"of type '\|O'"),
    ("tokens", packed(np.zeros(4, np.int32)), r"positions has the shape \(3,\)"),
    ("tokens", packed(np.zeros((3, 1), np.int32)), r"shape \(3, 1\), it must be \('T',\)"),
    ("copies", packed(np.zeros((1, 3), np.int32)), r"shape \(1, 3\)"),
    ("row_starts", packed(np.zeros(4, np.int32)), "2 of B, but 4 borders"),
    ("seed", Packed("<u4", (2, 2), bytes(15)), "has 15 bytes"),
    ("page_tables", Packed("<i4", (2, -2), b""), r"shape \(2, -2\)"),
    ("page_tables", Packed("<i4", (2, 1 << 62), b""), "shape"),
    ("page_tables", Packed("<i4", (2, (1 << 31) - 1), b""), "has 0 bytes"),
])  # fmt: skip
def test_a_step_with_an_array_that_does_not_fit_is_refused(name, wrong, says):
    message = pack_step(a_step())
    frame = encode(Step(message.arrays | {name: wrong}))
    with pytest.raises(WireError, match=says):
        unpack_step(decode_order(frame))


def test_a_step_with_an_array_too_many_or_too_few_is_refused():
    arrays_ = pack_step(a_step()).arrays
    for wrong in (arrays_ | {"more": packed(np.zeros(1))}, {k: v for k, v in arrays_.items() if k != "tokens"}):
        with pytest.raises(WireError, match="other arrays"):
            unpack_step(Step(wrong))


def test_truth_values_are_0_or_1():
    ints = packed(np.zeros(1, np.int32))
    history = {"starts": packed(np.zeros(3, np.int32)), "tokens": ints, "counts": ints}
    history["in_prompt"] = Packed("|b1", (1,), b"\2")
    with pytest.raises(WireError, match="truth values"):
        unpack_step(Step(pack_step(a_step()).arrays, history))


HOSTILE = [
    b"\xc1", b"\x80", b"\xff" * 40, b"\x91" * 5000, msgspec.msgpack.encode({"type": "Step"}), msgspec.msgpack.encode([1, 2]),
    msgspec.msgpack.encode({"type": "Shell", "command": "x"}), msgspec.msgpack.encode({"type": "Close", "more": 1}),
    b"\x82\xa4type\xa5Ready\xa6device\xa2\xff\xfe", msgspec.msgpack.encode({"type": "Pages", "count": "many", "memory": {}}),
]  # fmt: skip


@pytest.mark.parametrize("decode", [decode_order, decode_answer, decode_join])
@pytest.mark.parametrize("frame", HOSTILE)
def test_a_frame_that_is_no_message_is_a_wire_error(decode, frame):
    with pytest.raises(WireError, match="is no message"):
        decode(frame)


@given(st.binary(max_size=200), st.data())
def test_any_bytes_are_a_message_or_a_wire_error(noise, data):
    whole = encode(pack_step(a_step()))
    at = data.draw(st.integers(0, len(whole)))
    for frame in (noise, whole[:at] + noise + whole[at:], whole[:at] + noise):
        try:
            order = decode_order(frame)
            if isinstance(order, Step):
                unpack_step(order)
        except WireError:
            continue


def test_a_join_comes_back_as_it_was():
    assert decode_join(encode(Join(3, "sums"))) == Join(3, "sums")


def test_every_array_of_a_step_has_a_declared_type():
    kinds = {kind: set(names) for kind, names in ((StepInput, STEP), (History, HISTORY), (Bias, BIAS))}
    assert {kind: set(types) for kind, types in messages.DTYPES.items()} == kinds
