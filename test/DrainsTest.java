import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;

import java.net.*;
import java.nio.file.Path;
import java.util.*;
import java.util.concurrent.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;

/**
 * Many short drains, some at the same time, each with other connections: when they come, how long they stay, how many
 * there are and with which settings the hook runs is random. To repeat a run, set DRAINS_SEED to the seed that it
 * printed: DRAINS_SEED=42 test/run DrainsTest.
 *
 * The machine's own pauses are not repeated and must not decide. So a drain waits for the hook's checks where a slow
 * check would make the right answer unknowable, and counts checks, not time.
 */
class DrainsTest {

    private static final int DRAINS = 12;
    private static final long SEED = Long.parseLong(
            System.getenv().getOrDefault("DRAINS_SEED", String.valueOf(System.nanoTime())));
    private static final int QUIET_SECONDS = 1;
    private static final int LONGEST_PAUSE_MS = 450;
    private static final int MOST_CONNECTIONS = 200;
    /** Containers without IPv6 have no ::1. */
    private static final String IPV6_IF_ANY = assertDoesNotThrow(
            () -> NetworkInterface.getByInetAddress(InetAddress.getByName("::1"))) == null ? "127.0.0.1" : "::1";

    /** The start or the end of a connection, so long after the start of the hook. */
    private record Event(long ms, int connection, boolean starts) { }

    @TempDir
    private Path directory;
    private final Server server = Server.start();
    private Server.OnSocket unixServer;
    private List<Callable<AutoCloseable>> kinds;
    private final Map<Integer, AutoCloseable> present = new HashMap<>();
    private Random random;
    private String drain; // in words
    private int checksNeeded;
    private Hook hook;

    @BeforeAll
    static void printSeed() { System.out.println("DRAINS_SEED=" + SEED); }

    @BeforeEach
    void listen() {
        unixServer = new Server.OnSocket(directory.resolve("b.sock"));
        kinds = List.of(server::connect, () -> server.connect(IPV6_IF_ANY), unixServer::connect);
    }

    @AfterEach
    void closeAll() {
        Optional.ofNullable(hook).ifPresent(Hook::close);
        unixServer.close();
        server.close();
    }

    @RepeatedTest(DRAINS)
    void neverLeavesTooEarlyNorTooLate(RepetitionInfo repetition) {
        // Seeds next to each other give much the same first numbers, unless they are spread.
        random = new Random(SEED + repetition.getCurrentRepetition() * 0x9E3779B97F4A7C15L);
        String tool = List.of("netstat", "ss", "none").get(random.nextInt(3));
        String path = Tools.only(directory.resolve("tools"),
                tool.equals("none") ? Map.of() : Map.of(tool, Tools.require(tool)));
        int checkMs = 60 + random.nextInt(61);
        checksNeeded = (QUIET_SECONDS * 1000 + checkMs - 1) / checkMs + 1;
        drain = "tool: " + tool + ", a check every " + checkMs + " ms, DRAINS_SEED=" + SEED;
        List<Event> events = randomEvents(checkMs);
        if (random.nextBoolean()) { open(events.remove(0)); }
        hook = Hook.start(Hook.env("BUILDKITD_PORT", server.port(), "BUILDKITD_SOCKET", directory.resolve("b.sock"),
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", QUIET_SECONDS, "CHECK_FREQUENCY_MS", checkMs,
                "PATH", path, "DEBUG", "1"));
        play(events);
        assertThat(hook.exitCode()).as(drain).isZero();
        assertThat(quietChecks()).as("quiet checks at the end, " + drain)
                .isBetween(hook.saidItsLast() ? checksNeeded : 0, checksNeeded);
        assertThat(hook.messages("warning")).as(drain).isEmpty();
    }

    private List<Event> randomEvents(int checkMs) {
        List<Event> events = new ArrayList<>();
        int number = (int) Math.round(Math.pow(MOST_CONNECTIONS, random.nextDouble())); // few more often than many
        long startMs = 0;
        long lastEndMs = 0;
        for (int i = 0; i < number; i++) {
            boolean afterPause = i == 0 || random.nextInt(number + 1) < 2;
            startMs = afterPause ? lastEndMs + 50 + random.nextInt(LONGEST_PAUSE_MS - 50)
                    : Math.min(startMs + random.nextInt(1 + 1200 / number), lastEndMs);
            long endMs = startMs + 4L * checkMs + random.nextInt(400);
            lastEndMs = Math.max(lastEndMs, endMs);
            events.add(new Event(startMs, i, true));
            events.add(new Event(endMs, i, false));
        }
        events.sort(Comparator.comparingLong(Event::ms));
        return events;
    }

    /** To their end, or until the hook has left where it had the right to. */
    private void play(List<Event> events) {
        long start = System.nanoTime();
        for (Event event : events) {
            Hook.pause(Math.max(0, event.ms - TimeUnit.NANOSECONDS.toMillis(System.nanoTime() - start)));
            if (!event.starts) {
                close(event);
            } else if (!present.isEmpty()) {
                open(event);
            } else {
                // The log must have come as far as this pause, to tell the checks before the pause from those after it.
                await(true);
                int before = quietChecks();
                open(event);
                await(false);
                if (!hook.process().isAlive()) {
                    assertThat(before).as("quiet checks in a pause that this machine has made so long that the hook"
                            + " was about to leave, " + drain).isGreaterThanOrEqualTo(checksNeeded / 2);
                    return;
                }
            }
        }
    }

    private void open(Event event) {
        Callable<AutoCloseable> kind = kinds.get(random.nextInt(kinds.size()));
        present.put(event.connection, assertDoesNotThrow(kind::call));
    }

    private void close(Event event) {
        if (present.size() == 1) {
            await(false);
            assertThat(hook.process().isAlive()).as("the hook stays for the last connection, " + drain).isTrue();
        }
        assertDoesNotThrow(() -> present.remove(event.connection).close());
    }

    /** How many checks have seen nobody since the last one that did. */
    private int quietChecks() {
        List<String> checks = new ArrayList<>(hook.checks());
        Collections.reverse(checks);
        return (int) checks.stream().takeWhile("0"::equals).count();
    }

    /** Waits until the last check in the log has seen nobody, or somebody, or the hook has left. */
    private void await(boolean quiet) {
        Hook.waitUntil("a check that sees " + (quiet ? "nobody, " : "somebody, ") + drain, () -> {
            List<String> checks = hook.checks();
            return !hook.process().isAlive()
                    || !checks.isEmpty() && checks.get(checks.size() - 1).equals("0") == quiet;
        });
    }
}
