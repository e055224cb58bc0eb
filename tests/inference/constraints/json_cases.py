# SPDX-License-Identifier: Apache-2.0
"""Thirty JSON schemas, logits that mean harm, and a judge of what comes out.

The judge is `jsonschema` with formats read by Python's own libraries; it
shares nothing with what makes the masks.
"""

import datetime
import ipaddress
import json
import re
import uuid

import numpy as np

SHORT = {'type': 'string', 'maxLength': 12}
DIGIT = {'type': 'integer', 'minimum': 0, 'maximum': 9}


def closed(needed=(), **properties):
  return {
    'type': 'object',
    'properties': properties,
    'required': list(needed),
    'additionalProperties': False,
  }


def formatted(name, most=40):
  return {'type': 'string', 'format': name, 'maxLength': most}


# Every text of theirs has an end.
BOUNDED = {
  'booleans': closed(('a', 'b'), a={'type': 'boolean'}, b={'type': 'null'}),
  'enum': {'enum': ['red', 'green "blue"', 'a\\b\n', 7, None, [1, {'x': 2}]]},
  'const': {'const': {'größe': ['😀', 1.5], '"': ' '}},
  'string': SHORT,
  'lengths': {'type': 'string', 'minLength': 3, 'maxLength': 7},
  'pattern': {'type': 'string', 'pattern': '^[a-z]{2,5}-[0-9]{3}$'},
  'inner pattern': {'type': 'string', 'pattern': 'ab+c', 'maxLength': 11},
  'date': {'type': 'string', 'format': 'date'},
  'date-time': {'type': 'string', 'format': 'date-time'},
  'time': closed(('at',), at={'type': 'string', 'format': 'time'}),
  'uuid': {'type': 'string', 'format': 'uuid'},
  'addresses': {
    'anyOf': [
      {'type': 'string', 'format': 'ipv4'},
      {'type': 'string', 'format': 'ipv6'},
    ]
  },
  'mail': closed(('to',), to=formatted('email'), at=formatted('hostname')),
  'integers': closed(
    ('a', 'b', 'c'),
    a={'type': 'integer', 'minimum': -17, 'maximum': 23},
    b={'type': 'integer', 'exclusiveMinimum': 0, 'exclusiveMaximum': 7},
    c={'type': 'integer', 'multipleOf': 7, 'minimum': -99, 'maximum': 999},
  ),
  'array': {'type': 'array', 'items': DIGIT, 'minItems': 2, 'maxItems': 5},
  'tuple': {
    'type': 'array',
    'prefixItems': [SHORT, DIGIT, {'type': 'boolean'}],
    'items': False,
    'minItems': 3,
  },
  'nested arrays': {
    'type': 'array',
    'maxItems': 2,
    'items': {'type': 'array', 'maxItems': 3, 'items': {'enum': [0, 'x']}},
  },
  'optional': closed(('b',), a=SHORT, b=DIGIT, c=SHORT, d={'type': 'null'}),
  'keys by pattern': {
    'type': 'object',
    'patternProperties': {'^k[0-9]$': DIGIT},
    'additionalProperties': False,
    'maxProperties': 3,
  },
  'kinds': {
    'type': ['string', 'null', 'boolean', 'array'],
    'maxLength': 5,
    'items': DIGIT,
    'maxItems': 3,
  },
  'all of': {
    'allOf': [
      {'type': 'object', 'properties': {'a': SHORT}, 'required': ['a']},
      {'properties': {'b': DIGIT}, 'required': ['b']},
    ],
    'properties': {'a': {'type': 'string', 'minLength': 2}, 'b': True},
    'additionalProperties': False,
  },
  'references': {
    '$defs': {'point': closed(('x', 'y'), x=DIGIT, y=DIGIT)},
    'type': 'array',
    'items': {'$ref': '#/$defs/point'},
    'maxItems': 3,
  },
  'one of': {
    'oneOf': [
      closed(('kind', 'size'), kind={'const': 'cat'}, size=DIGIT),
      closed(('kind', 'name'), kind={'const': 'dog'}, name=SHORT),
    ]
  },
  'as pydantic writes': {
    '$schema': 'https://json-schema.org/draft/2020-12/schema',
    'title': 'Order',
    'type': 'object',
    'properties': {
      'id': {'title': 'Id', 'type': 'integer', 'minimum': 1, 'maximum': 9999},
      'note': {
        'anyOf': [{'type': 'string', 'maxLength': 9}, {'type': 'null'}],
        'default': None,
      },
      'kinds': {'items': {'enum': ['a', 'b']}, 'type': 'array', 'maxItems': 4},
    },
    'required': ['id', 'kinds'],
  },
}
# Digits, letters or depth without end.
UNBOUNDED = {
  'any object': {'type': 'object'},
  'anything': {},
  'text and number': closed(
    ('t', 'n'), t={'type': 'string'}, n={'type': 'number', 'minimum': -3.5}
  ),
  'map': {
    'type': 'object',
    'additionalProperties': {'type': 'boolean'},
    'minProperties': 1,
  },
  'tree': {
    '$defs': {
      'node': closed(
        ('value', 'children'),
        value={'type': 'integer'},
        children={'type': 'array', 'items': {'$ref': '#/$defs/node'}},
      )
    },
    '$ref': '#/$defs/node',
  },
  'numbers': {
    'type': 'array',
    'items': {'type': 'number', 'minimum': 0, 'exclusiveMaximum': 1},
    'minItems': 1,
    'maxItems': 3,
  },
}
SCHEMAS = BOUNDED | UNBOUNDED

# What is favoured: tokens of nothing but these.
FAVOURED = {
  'nothing': '',
  'white space': ' \t\r\n',
  'quotes': '"\'',
  'digits': '0123456789',
  'braces': '{}[]',
  'escapes': '\\u/nrt0',
  'separators': ',: ',
  'exponents': '0123456789eE+-.',
  'blanks and braces': ' \n{}[]",:',
}
KINDS = (*FAVOURED, 'broken letters', 'long tokens', 'no end')


def bias(kind, texts, ends):
  """float32 [v] that is put to random logits.

  Args:
    texts: bytes of each token.
  """
  actual = np.zeros(len(texts), np.float32)
  if kind == 'long tokens':
    return np.array([len(text) for text in texts], np.float32) * 3
  if kind == 'no end':
    actual[list(ends)] = -99
    return actual
  signs = FAVOURED.get(kind, '').encode()
  for i, text in enumerate(texts):
    if kind == 'broken letters':
      actual[i] = 20.0 * any(byte > 127 for byte in text)
    else:
      actual[i] = 20.0 * (bool(text) and all(byte in signs for byte in text))
  return actual


def stream(constraint, ends, favour, rng, most):
  """(ids, whether they ended) of random logits under a constraint."""
  ids = []
  for _ in range(most):
    mask = constraint.mask()
    logits = rng.standard_normal(len(mask), np.float32) * 3 + favour
    token = int(np.where(mask, logits, -np.inf).argmax())
    done = constraint.accept(token)
    if token in ends:
      return ids, True
    ids.append(token)
    if done:
      return ids, True
  return ids, False


def judge(jsonschema, schema):
  """text -> None, or raises where it is not JSON that fits the schema."""
  checker = jsonschema.FormatChecker(formats=())
  for name, reads in _FORMATS.items():
    checker.checks(name, ValueError)(reads)
  validator = jsonschema.Draft202012Validator(schema, format_checker=checker)

  def check(text):
    validator.validate(json.loads(text, parse_constant=_no_json))
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
    # One blank after a comma or a colon, and no other white space.
    assert not re.search(r'(?<![,:]) |[\t\r\n]', bare), text

  return check


def _no_json(text):
  raise ValueError(f'{text} is no JSON')


def _date(text):
  # Python's years begin with 1; 2000 is a leap year as 0 is.
  datetime.date.fromisoformat(text.replace('0000-', '2000-', 1))
  return bool(re.fullmatch(r'\d{4}-\d\d-\d\d', text, re.ASCII))


def _time(text):
  expected = r'\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)'
  datetime.time.fromisoformat(re.sub(r'\.\d+', '', text))
  return bool(re.fullmatch(expected, text, re.ASCII))


def _date_time(text):
  day, _, time = text.partition('T')
  return _date(day) and _time(time)


def _mail(text):
  name, _, host = text.rpartition('@')
  address = re.fullmatch(r'\[(.*)\]', host)
  known = address and ipaddress.IPv4Address(address[1]) or _host(host)
  letters = r"[\w!#$%&'*+/=?^`{|}~-]+"
  whole = re.fullmatch(rf'{letters}(\.{letters})*', name, re.ASCII)
  return bool(known and whole)


def _host(text):
  label = '[a-zA-Z0-9]([a-zA-Z0-9-]*[a-zA-Z0-9])?'
  return bool(re.fullmatch(rf'{label}(\.{label})*', text))


def _read(reader):
  return lambda text: bool(reader(text)) or True


_FORMATS = {
  'date': _date,
  'time': _time,
  'date-time': _date_time,
  'email': _mail,
  'hostname': _host,
  'uuid': _read(uuid.UUID),
  'ipv4': _read(ipaddress.IPv4Address),
  'ipv6': _read(ipaddress.IPv6Address),
}
