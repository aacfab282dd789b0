"""Runs the script with gRPC's C core, and prints the replies as JSON.

The script comes on standard input, as JSON; the socket is the only argument. Messages pass as bytes, so that
no generated code is needed.
"""

import json
import sys
import threading
import time

import grpc

QUIET = 1.0


def fields(metadata):
    text = lambda value: value.hex() if isinstance(value, bytes) else value
    return sorted([name, text(value)] for name, value in metadata or ())


def outcome(call, messages):
    code = call.code()
    return {
        "status": f"{code.name} {call.details()}",
        "headers": fields(call.initial_metadata()),
        "messages": [message.hex() for message in messages],
        "trailers": fields(call.trailing_metadata()),
    }


def unary(channel, method, request):
    call = channel.unary_unary(method)
    try:
        message, call = call.with_call(request, timeout=59, metadata=[("x-ebb", "diff")])
    except grpc.RpcError as error:
        return outcome(error, [])
    return outcome(call, [message])


class Stream:
    """Reads a stream until it is cancelled."""

    def __init__(self, channel, method, request):
        self.messages = []
        self.call = channel.unary_stream(method)(request)
        self.thread = threading.Thread(target=self.read)
        self.thread.start()

    def read(self):
        try:
            self.messages.extend(iter(self.call))
        except grpc.RpcError:
            pass

    def end(self):
        self.call.cancel()
        self.thread.join()
        return outcome(self.call, self.messages)


def main():
    # Kubelets send this from 1.31 on. The C core's default for a unix socket is its path.
    options = [("grpc.default_authority", "localhost")]
    channel = grpc.insecure_channel("unix:" + sys.argv[1], options)
    ids, outcomes, streams = {}, [], []
    for number, step in enumerate(json.load(sys.stdin)):
        request = bytes.fromhex(step["request"])
        for placeholder, name in ids.items():
            request = request.replace(placeholder.encode(), name.encode())
        if step["streams"]:
            streams.append((number, Stream(channel, step["method"], request)))
            outcomes.append(None)
            time.sleep(QUIET)
            continue
        result = unary(channel, step["method"], request)
        if step["saves_id_as"]:
            if not result["messages"]:
                sys.exit(f"{step['method']}: {result}")
            message = bytes.fromhex(result["messages"][0])
            ids[step["saves_id_as"]] = message[2 : 2 + message[1]].decode()
        outcomes.append(result)
    time.sleep(QUIET)
    for number, stream in streams:
        outcomes[number] = stream.end()
    json.dump({"outcomes": outcomes, "ids": ids}, sys.stdout)


main()
