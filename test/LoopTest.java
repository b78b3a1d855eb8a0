import static java.util.Collections.frequency;
import static org.assertj.core.api.Assertions.assertThat;

import java.nio.file.Path;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** When the hook stays, when it leaves, and what it says meanwhile. */
class LoopTest {

    /** How much later a process may end on a busy machine. Less than a minute, for which some would sleep wrongly. */
    private static final Duration MARGIN = Duration.ofSeconds(55);

    private static Map<String, String> settings(Server server, int checkFrequencyMs, int quietSeconds) {
        return Hook.env("BUILDKITD_PORT", server.port(), "CHECK_FREQUENCY_MS", checkFrequencyMs,
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", quietSeconds, "DEBUG", "1");
    }

    @ParameterizedTest
    @CsvSource({"100, 1, 10, 11", "300, 1, 4, 5", "10000, 9, 2, 2", "500, 0, 1, 1", "250, 2, 8, 9"})
    void leavesAtOnceAfterEnoughQuietChecksAndTheQuietTime(int checkFrequencyMs, int quietSeconds, int fewest,
            int most) { // fewer only where the checks themselves take long
        try (Server server = Server.start(); Hook hook = Hook.start(settings(server, checkFrequencyMs, quietSeconds))) {
            assertThat(hook.exitCode()).isZero();
            Duration sleeps = Duration.ofMillis((long) checkFrequencyMs * (fewest - 1));
            assertThat(hook.age()).isBetween(sleeps, sleeps.plus(MARGIN))
                    .isGreaterThan(Duration.ofSeconds(quietSeconds));
            assertThat(hook.checks()).hasSizeBetween(fewest, most).containsOnly("0");
            assertThat(hook.messages("info")).startsWith("[PreStop Hook] Waiting for build processes to finish...")
                    .endsWith("[PreStop Hook] All build processes seem to have stopped. Exiting now.");
        }
    }

    @Test
    void staysWhileAClientIsConnectedAndLeavesAfterTheQuietTime() {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(settings(server, 50, 1))) {
            Hook.waitUntil("far more checks than the quiet time needs", () -> hook.checks().size() > 60);
            assertThat(hook.process().isAlive()).isTrue();
            assertThat(hook.checks()).containsOnly("1");
            Duration closed = hook.age();
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.age().minus(closed)).isBetween(Duration.ofMillis(950), Duration.ofSeconds(1).plus(MARGIN));
        }
    }

    @Test
    void startsCountingAnewAfterEachConnection() {
        try (Server server = Server.start(); Hook hook = Hook.start(settings(server, 50, 3))) {
            for (int build = 1; build <= 3; build++) {
                int before = hook.checks().size();
                Hook.waitUntil("a pause shorter than the quiet time", () -> hook.checks().size() >= before + 20);
                Server.Connection connection = server.connect();
                hook.awaitChecks("1", frequency(hook.checks(), "1") + 1);
                connection.close();
            }
            assertThat(hook.exitCode()).isZero();
            List<String> checks = hook.checks();
            assertThat(checks.size() - 1 - checks.lastIndexOf("1")).isBetween(60, 61);
        }
    }

    @Test
    void namesAFewPeersAndCountsTheRest() {
        try (Server server = Server.start(); Server.Connection first = server.connect();
                Hook hook = Hook.start(settings(server, 50, 1))) {
            String peer = "127.0.0.1:" + first.client().getLocalPort();
            hook.awaitLog("1 connection to port " + server.port() + " from " + peer
                    + " and 0 to buildkitd.sock. Waited ");
            for (int i = 2; i <= 12; i++) {
                server.connect();
            }
            hook.awaitLog("12 connections to port " + server.port() + " from ")
                    .awaitLog(" and 7 more and 0 to buildkitd.sock. Waited ");
        }
    }

    @Test
    void saysTheNumberWhenItChangesAndNotOnEveryCheck() {
        try (Server server = Server.start(); Hook hook = Hook.start(settings(server, 20, 2))) {
            hook.awaitLog(" 0 connections to port");
            Server.Connection build = server.connect();
            hook.awaitLog(" 1 connection to port");
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.messages("info").stream().filter(line -> line.contains(" to port ")))
                    .extracting(line -> line.replaceFirst(".*Hook] (\\d+) .*", "$1")).containsExactly("0", "1", "0");
        }
    }

    @Test
    void givesASignOfLifeEveryMinute() {
        try (Server server = Server.start(); Server.Connection build = server.connect();
                Hook hook = Hook.start(settings(server, 500, 1))) {
            Hook.pause(55_000);
            Hook.waitUntil("a second line", () -> reports(hook).size() == 2);
            assertThat(reports(hook)).last().asString().contains(":" + build.client().getLocalPort())
                    .containsPattern("Waited (59|6\\d) s");
        }
    }

    @Test
    void givesUpAtMaxWaitSecondsAndSaysWhoWasConnected() {
        try (Server server = Server.start(); Server.Connection build = server.connect()) {
            Map<String, String> settings = Hook.quick(server.port());
            settings.put("MAX_WAIT_SECONDS", "2");
            try (Hook hook = Hook.start(settings)) {
                assertThat(hook.exitCode()).isEqualTo(124);
                assertThat(hook.age()).isBetween(Duration.ofSeconds(2), Duration.ofSeconds(2).plus(MARGIN));
                assertThat(hook.messages("warning")).containsExactly(
                        "[PreStop Hook] Giving up after MAX_WAIT_SECONDS, 2 s: 1 connection to port " + server.port()
                                + " from 127.0.0.1:" + build.client().getLocalPort() + " and 0 to buildkitd.sock.");
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"60000, 3600, 1", "100, 3600, 1",
        "10000, 18, 18"}) // where a third look, 8 s after the second, would make the quiet time full
    void givesUpInTimeHoweverSeldomItChecksAndThoughItIsQuietButNotForLong(int checkFrequencyMs, int quietSeconds,
            int maxWaitSeconds) {
        try (Server server = Server.start()) {
            Map<String, String> settings = settings(server, checkFrequencyMs, quietSeconds);
            settings.put("MAX_WAIT_SECONDS", String.valueOf(maxWaitSeconds));
            try (Hook hook = Hook.start(settings)) {
                assertThat(hook.exitCode()).isEqualTo(124);
                Duration limit = Duration.ofSeconds(maxWaitSeconds);
                assertThat(hook.age()).isBetween(limit, limit.plus(MARGIN));
            }
        }
    }

    @Test
    void takesARoundThatThrowsForOneThatIsNotQuietAndGoesOn() throws InterruptedException {
        BuildkitPrestop hook = new BuildkitPrestop();
        AtomicInteger lines = new AtomicInteger();
        ExecutorService writer = new ThreadPoolExecutor(1, 1, 0, TimeUnit.SECONDS, new ArrayBlockingQueue<>(1)) {
            @Override
            public void execute(Runnable line) { // the first, before the loop, is fine, and so are those from the fifth
                switch (lines.incrementAndGet()) {
                    case 2, 3 -> throw new IllegalStateException("cannot be logged");
                    case 4 -> throw new StackOverflowError("cannot be logged either");
                    default -> { }
                }
            }
        };
        try (Server server = Server.start()) {
            hook.port = server.port();
            hook.socket = "";
            hook.checkFrequencyMs = 10;
            hook.source = BuildkitPrestop.ConnectionSource.procfs;
            hook.log = new Log(Log.Format.text, "", false, writer);
            assertThat(hook.new Drain().waitUntilQuiet()).isZero();
            assertThat(lines).hasValue(6);
        }
    }

    @Test
    void printsTheCountOnceAndNothingElse() {
        try (Server server = Server.start()) {
            for (String count : List.of("0", "1", "2")) {
                try (Hook hook = Hook.start(Hook.env(), "--once", "--port", String.valueOf(server.port()))) {
                    assertThat(hook.exitCode()).isZero();
                    assertThat(hook.out()).containsExactly(count);
                    assertThat(hook.err()).isEmpty();
                }
                server.connect();
            }
        }
    }

    /** As BuildKit's StatefulSet does. */
    @Test
    void isContentWithAListenerOnTheUnixSocketAndWaitsForItsConnections(@TempDir Path directory) throws Exception {
        Path socket = directory.resolve("b.sock");
        Map<String, String> settings = Hook.quick(1);
        settings.remove("BUILDKITD_PORT");
        settings.put("BUILDKITD_SOCKET", socket.toString());
        settings.put("DEBUG", "1");
        try (Server.OnSocket server = new Server.OnSocket(socket);
                AutoCloseable build = server.connect(); Hook hook = Hook.start(settings)) {
            hook.awaitLog("0 connections to port 1234 and 1 to " + socket + ". Waited ");
            Hook.waitUntil("far more checks than the quiet time needs", () -> hook.checks().size() > 60);
            Duration closed = hook.age();
            build.close();
            assertThat(hook.exitCode()).isZero();
            assertThat(hook.age().minus(closed)).isGreaterThan(Duration.ofMillis(950));
            assertThat(hook.messages("warning")).isEmpty();
        }
    }

    private static List<String> reports(Hook hook) {
        return hook.messages("info").stream().filter(line -> line.contains("1 connection to port")).toList();
    }
}
