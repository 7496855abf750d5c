"""Correct a fact, write the corrected model, and ask it over HTTP, by a server that knows nothing of errata.

python examples/serve_the_result.py [FOLDER]; needs pip install 'transformers[serving]'. Listens on loopback only.
"""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import errata

folder = sys.argv[1] if len(sys.argv) > 1 else "corrected"
lm = errata.load("almanac")
fact = errata.Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
errata.export.merge(errata.ROME.preset(lm).edit(lm, [fact]), lm, folder)

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--host", "127.0.0.1", "--port", port]
server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    asked = json.dumps({"model": folder, "prompt": fact.text, "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", asked, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(f"{fact.text}{json.load(answer)['choices'][0]['text']}")
finally:
    server.terminate()
    server.wait()
