"""A pickle reader that can build tensors, plain containers and inert records, and nothing else.

It never imports what a file names: a name is looked up in a table of stand-ins, or the file is refused. Of the opcodes
of pickle only those are known that checkpoints need, and those that act on objects check their exact types, so no file
can call, change or index anything else. The pure-Python `pickle._Unpickler` is the base because the C one allocates its
memo by the largest index in the file, and offers no way to restrict opcodes.
"""

import collections
import pickle
import pickletools
import struct

from common.checkpoints.errors import Damaged, Refused, printable

MAX_READS = 2_500_000  # a ResNet-110 with Adam's state, pickled as whole objects, takes 154,000
_MAX_LINE = 1024

_INHERITED = (
    "PROTO STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT EMPTY_SET "
    "BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL BINPERSID"
).split()


class PickleSource:
    """Bytes with a position, from which pickles and raw data are read in turn; a read beyond the end is an error."""

    def __init__(self, data, max_reads=None):
        self._data = data
        self._position = 0
        self._reads = 0
        self._max_reads = MAX_READS if max_reads is None else max_reads

    @property
    def remaining(self):
        return len(self._data) - self._position

    def take(self, count):
        """The next `count` bytes as a memoryview."""
        start = self._advance(count)
        return memoryview(self._data)[start : self._position]

    def read(self, count):
        self._reads += 1
        if self._reads > self._max_reads:
            raise Refused(f"its pickle takes more than {self._max_reads} steps")
        start = self._advance(count)
        return self._data[start : self._position]

    def readline(self):
        end = self._data.find(b"\n", self._position, self._position + _MAX_LINE)
        if end < 0:
            raise Damaged("a line in its pickle does not end")
        return self.read(end + 1 - self._position)

    def _advance(self, count):
        start, end = self._position, self._position + count
        if not start <= end <= len(self._data):
            raise Damaged("it is truncated: it ends before its data does")
        self._position = end
        return start


class _Opcodes(dict):
    def __missing__(self, opcode):
        def refuse(_):
            name = getattr(pickletools.code2op.get(chr(opcode)), "name", f"0x{opcode:02x}")
            raise Refused(f"its pickle uses the opcode {name}, which checkpoints do not need")

        return refuse


class RestrictedUnpickler(pickle._Unpickler):
    """Reads one pickle from a PickleSource. stand_ins: a StandIns; persistent_load: called with each persistent id."""

    dispatch = _Opcodes({op: pickle._Unpickler.dispatch[op] for op in (getattr(pickle, n)[0] for n in _INHERITED)})

    def __init__(self, source, stand_ins, persistent_load):
        super().__init__(source, encoding="latin1")  # Python 2 strings are bytes; latin1 never fails
        self._source = source
        self._stand_ins = stand_ins
        self._persistent_load = persistent_load

    def find_class(self, module, name):
        return self._stand_ins.find(module, name)

    def persistent_load(self, pid):
        return self._persistent_load(pid)

    def _load_frame(self):
        (size,) = struct.unpack("<Q", self.read(8))
        if size > self._source.remaining:  # else only a hint to read ahead, which is not needed here
            raise Damaged("it is truncated: a frame of its pickle is longer than the file")

    def _load_inst(self):
        module, name = self.readline()[:-1].decode("latin1"), self.readline()[:-1].decode("latin1")
        self._stand_ins.find(module, name)  # to refuse by name, if it can be
        raise Refused(f"it makes an object of {printable(f'{module}.{name}')} by the opcode INST")

    def _load_append(self):
        self._extend([self.stack.pop()])

    def _load_appends(self):
        self._extend(self.pop_mark())

    def _extend(self, items):
        if type(self.stack[-1]) is not list:
            raise Refused("it appends to something that is no list")
        self.stack[-1].extend(items)

    def _load_setitem(self):
        value = self.stack.pop()
        self._set_items([self.stack.pop(), value])

    def _load_setitems(self):
        self._set_items(self.pop_mark())

    def _set_items(self, items):
        target = self.stack[-1]
        if type(target) not in (dict, collections.OrderedDict):
            raise Refused("it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._stand_ins.key(key)] = value

    def _load_additems(self):
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise Refused("it adds items to something that is no set")
        self.stack[-1].update(self._stand_ins.key(item) for item in items)

    def _load_call(self):
        args = self.stack.pop()
        self.stack[-1] = self._stand_ins.call(self.stack[-1], args)

    def _load_build(self):
        state = self.stack.pop()
        self._stand_ins.set_state(self.stack[-1], state)

    dispatch.update(
        {
            pickle.FRAME[0]: _load_frame,
            pickle.INST[0]: _load_inst,
            pickle.APPEND[0]: _load_append,
            pickle.APPENDS[0]: _load_appends,
            pickle.SETITEM[0]: _load_setitem,
            pickle.SETITEMS[0]: _load_setitems,
            pickle.ADDITEMS[0]: _load_additems,
            pickle.REDUCE[0]: _load_call,
            pickle.NEWOBJ[0]: _load_call,
            pickle.BUILD[0]: _load_build,
        }
    )
