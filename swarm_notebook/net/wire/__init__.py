"""What travels between peers, how it is framed, and what each peer may take by it.

Requests are named in `protocol`; `tensors` and `codecs` read and write what they carry. `streams`
frames messages and `stream_server` answers them, within limits: `format` counts a message's fields
before it is parsed, `traffic` its bytes, `conduct` how often its sender was refused. Nothing large
is copied on the way: a `message` is written from where its tensors are, and a `frame` is read to
where they stay.
"""
