"""The usual way to stay registered: a thread for each account that registers, sleeps until the refresh, and again.

    python bench/usual_register.py PORT HOSTS ACCOUNTS INTERVAL PER_SECOND SECONDS
    python bench/usual_register.py PORT HOSTS ACCOUNTS INTERVAL once THREADS

It knows no database, no claims and no restarts: accounts, CSeq and Call-ID are in memory. The same messages, digests
and times of refreshes as the fleet's, over a blocking UDP socket for each attempt. Threads are started so many a
second, as the fleet starts attempts. `once`: each account is registered once, by so many threads. Prints JSON at the
end: when each refresh fell due, by account.
"""

import json
import os
import queue
import random
import socket
import sys
import threading
import time

from registrars import PASSWORD

from providers.sip import Account, Attempt, Kind, Outcome, refresh_after
from providers.sip_message import Request, Response, encode, read

T1, T2, LAST = 0.5, 4.0, 32.0


class Customer:
    def __init__(self, n: int, host: str, port: int, interval: int) -> None:
        self.server = (host, port)
        self.account = Account(
            domain=host,
            user=f"u{n}",
            auth_user=f"u{n}",
            password=PASSWORD,
            contact=f"sip:usual{n}@localhost;transport=udp",
            call_id=f"usual-{n}",
            from_tag=f"u{n}",
            interval=interval,
            port=port,
        )
        self.cseq = 1
        self.due: list[float] = []

    def register(self) -> tuple[Outcome | None, float]:
        """What came of it, None after silence; and when what was granted was sent (monotonic)."""
        attempt = Attempt(self.account, cseq=self.cseq)
        step: Request | Outcome = attempt.begin()
        sent = time.monotonic()
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect(self.server)
            while isinstance(step, Request):
                sent = time.monotonic()
                response = exchange(sock, step)
                if response is None:
                    self.cseq = attempt.cseq + 1
                    return None, sent
                step = attempt.answered(response)
        self.cseq = attempt.cseq + 1
        return step, sent

    def stay(self, dice: random.Random) -> None:
        while True:
            outcome, sent = self.register()
            granted = outcome.granted if outcome and outcome.kind is Kind.REGISTERED else None
            wait = 5.0 if granted is None else refresh_after(granted, dice) - (time.monotonic() - sent)
            if granted is not None:
                self.due.append(time.time() + wait)
            time.sleep(max(0.0, wait))


def exchange(sock: socket.socket, request: Request) -> Response | None:
    local, port = sock.getsockname()
    branch = f"z9hG4bK{random.getrandbits(80):x}"
    via = f"SIP/2.0/UDP {local}:{port};branch={branch};rport"
    data = encode(request.at_contact_host(local), via=via)  # without the port, which is another each time
    end, wait = time.monotonic() + LAST, T1
    while (now := time.monotonic()) < end:
        try:
            sock.send(data)
            again = now + wait
            while (left := again - time.monotonic()) > 0:
                sock.settimeout(left)
                response = read(sock.recv(65_535))
                if response and response.branch == branch and response.status >= 200:
                    return response
        except (TimeoutError, ConnectionRefusedError):
            pass
        wait = min(wait * 2, T2)
    return None


def once(customers: list[Customer], threads: int) -> None:
    waiting: queue.SimpleQueue[Customer] = queue.SimpleQueue()
    for customer in customers:
        waiting.put(customer)

    def work() -> None:
        while True:
            try:
                customer = waiting.get_nowait()
            except queue.Empty:
                return
            outcome, _ = customer.register()
            assert outcome is not None
            assert outcome.kind is Kind.REGISTERED, outcome

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main() -> None:
    port, hosts, count, interval = (int(word) for word in sys.argv[1:5])
    customers = [Customer(n, f"127.0.0.{n % hosts + 1}", port, interval) for n in range(count)]
    if sys.argv[5] == "once":
        began, used = time.monotonic(), time.process_time()
        once(customers, int(sys.argv[6]))
        print(json.dumps({"seconds": time.monotonic() - began, "cpu": time.process_time() - used}), flush=True)
        return
    threading.stack_size(512 * 1024)
    end = time.monotonic() + float(sys.argv[6])
    for customer in customers:
        dice = random.Random(customer.account.user)
        threading.Thread(target=customer.stay, args=(dice,), daemon=True).start()
        time.sleep(1 / float(sys.argv[5]))
    time.sleep(max(0.0, end - time.monotonic()))
    print(json.dumps({customer.account.user: customer.due for customer in customers}), flush=True)
    os._exit(0)  # nobody waits for threads that sleep


if __name__ == "__main__":
    main()
