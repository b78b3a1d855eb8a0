import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;
import java.util.function.Predicate;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.RepeatedTest;
import org.junit.jupiter.api.RepetitionInfo;
import org.junit.jupiter.api.io.TempDir;

/**
 * Many short drains, some at the same time, each with other connections: when they come, how long they stay, how many
 * there are and with which settings the hook runs is random. To repeat a run, set DRAINS_SEED to the seed that it
 * printed: DRAINS_SEED=42 test/run DrainsTest.
 *
 * The machine's own pauses are not repeated and must not decide. So a drain waits for the hook's checks where a slow
 * check would make the right answer unknowable, and all times are taken on the side that is bad for the hook.
 */
class DrainsTest {

    private static final int DRAINS = 30;
    private static final long SEED = System.getenv("DRAINS_SEED") == null ? System.nanoTime()
            : Long.parseLong(System.getenv("DRAINS_SEED"));
    private static final int QUIET_SECONDS = 1;
    private static final int LONGEST_PAUSE_MS = 450;
    private static final int MOST_REASONS = 200;
    private static final Predicate<String> QUIET = "0"::equals;
    private static final Predicate<String> BUSY = QUIET.negate();
    /** Containers without IPv6 have no ::1. */
    private static final boolean IPV6 = Hook.run(List.of("grep", "-q", "^0\\{31\\}1 ", "/proc/net/if_inet6"), Map.of())
            .exitCode() == 0;

    @TempDir
    private Path directory;

    @BeforeAll
    static void printSeed() {
        System.out.println("DRAINS_SEED=" + SEED);
    }

    @RepeatedTest(DRAINS)
    void neverLeavesTooEarlyNorTooLate(RepetitionInfo repetition) {
        // Seeds next to each other give much the same first numbers, unless they are spread.
        Random random = new Random(SEED + repetition.getCurrentRepetition() * 0x9E3779B97F4A7C15L);
        String source = List.of("auto", "netstat", "ss", "procfs", "flaky netstat").get(random.nextInt(5));
        if (source.endsWith("netstat") || source.equals("ss")) {
            Tools.require(source.replace("flaky ", ""));
        }
        try (Server server = Server.start(); Drain drain = new Drain(server, random, source)) {
            drain.run();
        }
    }

    /** What makes the hook stay, and for how long: a connection, or netstat cannot tell whether there is one. */
    private record Reason(int number, Kind kind, long startMs, long endMs) {
        enum Kind { IPV4, IPV6, UNIX, OUTAGE }
    }

    /** The start or the end of a reason. */
    private record Event(long ms, boolean starts, Reason reason) {
    }

    /** One run of the hook, from its start to its end. */
    private final class Drain implements AutoCloseable {
        private final Server server;
        private final Random random;
        private final int checkMs;
        private final String source;
        private final List<Event> events = new ArrayList<>();
        private final Map<Reason, AutoCloseable> present = new HashMap<>();
        private final Path broken = directory.resolve("broken");
        private final Path socket = directory.resolve("b.sock");
        private final Server.OnSocket unixServer = new Server.OnSocket(socket);
        private int outages;
        private Hook hook;
        private CompletableFuture<Long> end;
        /** A moment before the last reason ended. */
        private long quietSince;

        Drain(Server server, Random random, String source) {
            this.server = server;
            this.random = random;
            this.source = source;
            int leastMs = source.equals("procfs") ? 20 : 40; // the others start a process for every check
            checkMs = leastMs + random.nextInt(51 - leastMs);
            int number = (int) Math.round(Math.pow(MOST_REASONS, random.nextDouble())); // few more often than many
            int pauses = random.nextInt(3);
            long startMs = random.nextInt(LONGEST_PAUSE_MS);
            long endMs = startMs;
            for (int i = 0; i < number; i++) {
                if (i > 0 && pauses > 0 && random.nextInt(number) < 3) {
                    pauses--;
                    startMs = endMs + 50 + random.nextInt(LONGEST_PAUSE_MS - 50);
                } else if (i > 0) {
                    startMs = Math.min(startMs + random.nextInt(1 + 1200 / number), endMs + LONGEST_PAUSE_MS);
                }
                Reason reason = new Reason(i, randomKind(), startMs, startMs + 4L * checkMs + random.nextInt(400));
                endMs = Math.max(endMs, reason.endMs);
                events.add(new Event(reason.startMs, true, reason));
                events.add(new Event(reason.endMs, false, reason));
            }
            events.sort(Comparator.comparingLong(Event::ms));
        }

        private Reason.Kind randomKind() {
            if (source.equals("flaky netstat") && random.nextInt(3) == 0) {
                return Reason.Kind.OUTAGE;
            }
            return random.nextInt(3) == 0 ? Reason.Kind.UNIX
                    : random.nextBoolean() && IPV6 ? Reason.Kind.IPV6 : Reason.Kind.IPV4;
        }

        void run() {
            boolean firstIsThereBefore = random.nextBoolean();
            if (firstIsThereBefore) {
                begin(events.remove(0).reason);
            }
            startHook();
            long start = System.nanoTime();
            for (Event event : events) {
                Hook.pause(Math.max(0, event.ms - TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start)));
                if (event.starts && !startReason(event.reason)) {
                    break;
                } else if (!event.starts) {
                    endReason(event.reason);
                }
            }
            assertLeftInTime();
        }

        private void startHook() {
            Map<String, String> settings = Hook.env("BUILDKITD_PORT", server.port(), "BUILDKITD_SOCKET", socket,
                    "CHECK_FREQUENCY_MS", checkMs,
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", QUIET_SECONDS, "DEBUG", "1",
                    "CONNECTION_SOURCE", source.replace("flaky ", ""));
            if (source.startsWith("flaky")) {
                Tools.stub(directory.resolve("netstat"),
                        "[ ! -e " + broken + " ] && exec " + Tools.require("netstat") + " \"$@\"");
                settings.put("PATH", directory + ":" + System.getenv("PATH"));
            }
            quietSince = System.nanoTime();
            hook = Hook.start(settings);
            end = hook.process().onExit().thenApply(ended -> System.nanoTime());
        }

        /** False where the hook had the right to leave before it could see this. */
        private boolean startReason(Reason reason) {
            if (!present.isEmpty()) {
                begin(reason);
                return true;
            }
            // The log must have come as far as this pause, to tell the checks before the pause from those after it.
            if (lastCheckIs(BUSY)) {
                await("a check in the pause", QUIET);
            }
            begin(reason);
            if (sinceQuiet(System.nanoTime()).compareTo(shortestQuiet()) < 0) {
                return true;
            }
            // This machine has made the pause so long that the hook may be about to leave.
            await("a check that sees the end of the pause", BUSY);
            return hook.process().isAlive();
        }

        private void endReason(Reason reason) {
            if (present.size() == 1) {
                await("a check that sees the last reason to stay", BUSY);
                quietSince = System.nanoTime();
            }
            end(reason);
        }

        private void begin(Reason reason) {
            present.put(reason, switch (reason.kind) {
                case IPV4 -> server.connect("127.0.0.1");
                case IPV6 -> server.connect("::1");
                case UNIX -> unixServer.connect();
                case OUTAGE -> outage();
            });
        }

        private void end(Reason reason) {
            try {
                present.remove(reason).close();
            } catch (Exception e) {
                throw new IllegalStateException(e);
            }
        }

        /** While there is at least one of these the hook's netstat fails. */
        private AutoCloseable outage() {
            try {
                if (outages++ == 0) {
                    Files.createFile(broken);
                }
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
            return () -> {
                if (--outages == 0) {
                    Files.delete(broken);
                }
            };
        }

        private Duration sinceQuiet(long time) {
            return Duration.ofNanos(time - quietSince);
        }

        /** The first of the checks that the quiet time needs comes at its very start. */
        private Duration shortestQuiet() {
            return Duration.ofSeconds(QUIET_SECONDS).minusMillis(checkMs);
        }

        private void assertLeftInTime() {
            Hook.waitUntil("the hook ends, " + this, end::isDone);
            assertThat(hook.exitCode()).as(toString()).isZero();
            assertThat(sinceQuiet(end.join())).as("from the end of the last connection to the hook's, " + this)
                    .isGreaterThanOrEqualTo(shortestQuiet());
            // How long a check takes, and how far behind the log is, says more about the other tests than about the
            // hook. So the latest moment to leave is told in quiet checks.
            int checksNeeded = (QUIET_SECONDS * 1000 + checkMs - 1) / checkMs;
            List<String> checks = hook.checks();
            int lastBusy = checks.size() - 1;
            while (lastBusy >= 0 && QUIET.test(checks.get(lastBusy))) {
                lastBusy--;
            }
            assertThat(checks.size() - 1 - lastBusy).as("quiet checks at the end, " + this)
                    .isBetween(checksNeeded, checksNeeded + 1);
            if (!source.startsWith("flaky")) {
                // A machine may be so busy that a tool has no answer in time, which only makes the hook stay.
                assertThat(hook.messages("warning")).as(toString()).allMatch(line -> line.contains("no answer in"));
            }
        }

        private boolean lastCheckIs(Predicate<String> kind) {
            List<String> checks = hook.checks();
            return !checks.isEmpty() && kind.test(checks.get(checks.size() - 1));
        }

        /** Waits until the last check in the log is of this kind. Where the hook has left, the end tells why. */
        private void await(String what, Predicate<String> kind) {
            Hook.waitUntil(what + ", " + this, () -> lastCheckIs(kind) || !hook.process().isAlive());
        }

        @Override
        public String toString() {
            return "source " + source + ", a check every " + checkMs + " ms, DRAINS_SEED=" + SEED;
        }

        @Override
        public void close() {
            List.copyOf(present.keySet()).forEach(this::end);
            unixServer.close();
            if (hook != null) {
                hook.close();
            }
        }
    }
}
