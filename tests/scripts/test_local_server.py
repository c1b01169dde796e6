from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from local_server import running
server = "import sys, http.server as s\\n" \\
    "class H(s.BaseHTTPRequestHandler):\\n    def do_GET(self): self.send_response(200); self.end_headers()\\n" \\
    "s.HTTPServer(('127.0.0.1', int(sys.argv[-1])), H).serve_forever()"
with running([sys.executable, "-c", server], Path(sys.argv[2])) as started:
    print(started.process.pid, flush=True)
    sys.stdin.read()
"""


def test_a_script_that_is_told_to_end_takes_its_server_along(tmp_path: Path) -> None:
    scripts = Path(__file__).parents[2] / "scripts"
    command = [sys.executable, "-c", SCRIPT, str(scripts), str(tmp_path / "log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        server = os.pidfd_open(int(script.stdout.readline()))
        script.terminate()
        assert script.wait(60) == 128 + signal.SIGTERM
    ended, _, _ = select.select([server], [], [], 60)
    os.close(server)
    assert ended
