import static java.util.Collections.frequency;
import static org.assertj.core.api.Assertions.assertThat;

import java.io.OutputStream;
import java.nio.file.Path;
import java.time.Duration;
import java.util.*;
import java.util.function.Predicate;
import java.util.stream.IntStream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.api.parallel.*;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** When the hook stays, when it leaves, and what it says meanwhile. */
@TestMethodOrder(MethodOrderer.OrderAnnotation.class)
@Execution(ExecutionMode.CONCURRENT) // all the same
class LoopTest {

    /** How much later a process may end on a busy machine. Less than a minute, for which some would sleep wrongly. */
    private static final Duration MARGIN = Duration.ofSeconds(55);

    private final Server server = Server.start();

    @AfterEach
    void stopServer() { server.close(); }

    private Map<String, String> settings(int checkFrequencyMs, int quietSeconds) {
        return Hook.env("BUILDKITD_PORT", server.port(), "CHECK_FREQUENCY_MS", checkFrequencyMs,
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", quietSeconds, "DEBUG", "1", "PATH", "/nowhere");
    }

    /** The second hook's checks are so rare that each gives a sign. */
    @Test
    @Order(1) // because it takes longest
    void givesASignOfLifeEveryMinuteOrAtEachCheck() {
        Server.Connection build = server.connect();
        try (Hook hook = Hook.start(settings(1000, 1)); Hook slow = Hook.start(settings(31_000, 1))) {
            for (Hook each : List.of(slow, hook)) {
                Hook.waitUntil("a second line", () -> reports(each).size() == 2);
                assertThat(reports(each)).last().asString().contains(":" + build.client().getLocalPort())
                        .containsPattern(each == slow ? "Waited [3-9]\\d s" : "Waited (59|[6-9]\\d) s");
            }
            assertThat(slow.checks()).hasSizeBetween(2, 3); // the third may come with the other hook's second line
            assertThat(reports(slow)).hasSameSizeAs(slow.checks());
        }
    }

    private static List<String> reports(Hook hook) {
        return hook.messages("info").stream().filter(line -> line.contains("1 connection to port")).toList();
    }

    // ---- The quiet time --------------------------------------------------------------------------------------------

    @ParameterizedTest
    @CsvSource({"100, 1, 11", "300, 1, 5", "2500, 2, 2", "500, 0, 2", "250, 2, 9"})
    void leavesAtOnceWhenTheQuietTimeLiesBetweenChecksAndNeverAfterOne(int checkMs, int quietSeconds, int checks) {
        try (Hook hook = Hook.start(settings(checkMs, quietSeconds))) {
            assertThat(hook.exitCode()).isZero();
            Duration sleeps = Duration.ofMillis((long) checkMs * (checks - 1));
            assertThat(hook.age()).isBetween(sleeps, sleeps.plus(MARGIN));
            assertThat(hook.checks()).hasSize(checks).containsOnly("0");
            assertThat(hook.messages("info")).first().asString().endsWith("] Waiting for build processes to finish...");
            assertThat(hook.messages("info")).last().asString()
                    .endsWith("] All build processes seem to have stopped. Exiting now.");
        }
    }

    @Test
    void staysWhileAClientIsConnectedAndLeavesAfterTheQuietTime() {
        Server.Connection build = server.connect();
        try (Hook hook = Hook.start(settings(100, 1))) {
            assertStaysAndLeaves(hook, build);
        }
    }

    /** As BuildKit's StatefulSet does. */
    @Test
    void isContentWithAListenerOnTheUnixSocketAndWaitsForItsConnections(@TempDir Path directory) {
        Path socket = directory.resolve("b.sock");
        Map<String, String> settings = settings(100, 1);
        settings.remove("BUILDKITD_PORT");
        settings.put("BUILDKITD_SOCKET", socket.toString());
        try (Server.OnSocket unixServer = new Server.OnSocket(socket)) {
            AutoCloseable build = unixServer.connect();
            try (Hook hook = Hook.start(settings)) {
                hook.awaitLog(" 1 connection to " + socket);
                assertStaysAndLeaves(hook, build);
                hook.awaitLog(" 0 connections to " + socket + "; nothing listens on port 1234. Waited ");
                assertThat(hook.messages("warning")).isEmpty();
            }
        }
    }

    private static void assertStaysAndLeaves(Hook hook, AutoCloseable build) {
        hook.awaitChecks("1", 14); // more than the quiet time needs
        assertThat(hook.process().isAlive()).isTrue();
        assertThat(hook.checks()).containsOnly("1");
        Duration closed = hook.age();
        Assertions.assertDoesNotThrow(build::close);
        assertThat(hook.exitCode()).isZero();
        assertThat(hook.age().minus(closed)).isBetween(Duration.ofSeconds(1), Duration.ofSeconds(1).plus(MARGIN));
    }

    @Test
    void startsCountingAnewAfterEachConnection() {
        try (Hook hook = Hook.start(settings(100, 3))) {
            for (int build = 1; build <= 3; build++) {
                int before = hook.checks().size();
                Hook.waitUntil("a pause shorter than the quiet time", () -> hook.checks().size() >= before + 12);
                Server.Connection connection = server.connect();
                hook.awaitChecks("1", frequency(hook.checks(), "1") + 1);
                connection.close();
            }
            assertThat(hook.exitCode()).isZero();
            List<String> checks = hook.checks();
            assertThat(checks.subList(checks.lastIndexOf("1") + 1, checks.size())).hasSize(31);
        }
    }

    // ---- What it says ----------------------------------------------------------------------------------------------

    @Test
    void saysWhoIsConnectedWhenTheNumberChangesAndNotOnEveryCheck() {
        Map<String, String> settings = settings(100, 2);
        settings.remove("DEBUG");
        try (Hook hook = Hook.start(settings)) {
            String port = " connections to port " + server.port();
            hook.awaitLog(" 0" + port + "; nothing listens on buildkitd.sock. Waited ");
            List<Server.Connection> builds = new ArrayList<>(List.of(server.connect()));
            hook.awaitLog(" 1 connection to port " + server.port() + " from 127.0.0.1:"
                    + builds.get(0).client().getLocalPort());
            while (builds.size() < 12) { builds.add(server.connect()); }
            hook.awaitLog(" 12" + port + " from 127.0.0.1:").awaitLog(" and 7 more");
            assertThat(hook.messages("info")).anyMatch(line ->
                    line.matches(".* from (127\\.0\\.0\\.1:\\d+, ){4}127\\.0\\.0\\.1:\\d+ and 7 more.*"));
            builds.forEach(Server.Connection::close);
            assertThat(hook.exitCode()).isZero();
            List<String> numbers = hook.messages("info").stream().filter(line -> line.contains(" to port "))
                    .map(line -> line.replaceFirst(".*Hook] (\\d+) .*", "$1")).toList();
            assertThat(numbers).startsWith("0", "1").endsWith("0");
            assertThat(IntStream.range(1, numbers.size())).noneMatch(i -> numbers.get(i).equals(numbers.get(i - 1)));
        }
    }

    @Test
    void takesARoundThatThrowsForOneThatIsNotQuietAndGoesOn() throws Exception {
        Lines lines = new Lines(2, 6);
        BuildkitPrestop hook = settings(lines, row -> row.port() == server.port());
        hook.debug = true; // a line for each check
        assertThat(new Drain(hook).waitUntilQuiet(OutputStream.nullOutputStream())).isZero();
        // Waiting; a check that fails, one that is quiet and news, one that fails, two that are quiet; Exiting.
        assertThat(lines.number).isEqualTo(1 + 2 + 2 + 2 + 1 + 1 + 1);
    }

    /** What the hook could not learn is told again when the reason is another one, not when a number in it is. */
    @Test
    void tellsWhyALookFailedAtEachNewReason() throws Exception {
        Lines lines = new Lines();
        List<Integer> linesBefore = new ArrayList<>(); // each look
        List<String> reasons = List.of("no row 1", "no row 22", "no row 3: see 4", "no file", "no row 1");
        BuildkitPrestop hook = settings(lines, row -> {
            if (row.port() == server.port() && linesBefore.size() < reasons.size()) {
                linesBefore.add(lines.number);
                throw new IllegalStateException(reasons.get(linesBefore.size() - 1));
            }
            return row.port() == server.port();
        });
        assertThat(new Drain(hook).waitUntilQuiet(OutputStream.nullOutputStream())).isZero();
        assertThat(linesBefore).containsExactly(1, 2, 2, 2, 3);
        assertThat(lines.number).isEqualTo(6); // the last reason, that it is quiet, Exiting
    }

    /** Settings of a hook in this JVM that leaves after two quiet checks. */
    private static BuildkitPrestop settings(Lines lines, Predicate<Row> owns) {
        BuildkitPrestop hook = new BuildkitPrestop();
        hook.checkFrequencyMs = 10;
        hook.log = lines;
        hook.endpoints.add(new Endpoint("port", true, owns, List.of(KernelTable.tcp, KernelTable.tcp6)));
        return hook;
    }

    /** Counts the lines of a log, and fails at some. */
    private static final class Lines extends Log {
        private final List<Integer> failing;
        int number;

        Lines(Integer... failing) {
            super(Format.text, "", false);
            this.failing = List.of(failing);
        }

        @Override
        void add(String level, Object message) {
            if (failing.contains(++number)) { throw new StackOverflowError("cannot be logged"); }
        }
    }

    // ---- The limit -------------------------------------------------------------------------------------------------

    @ParameterizedTest
    @CsvSource({"60000, 3600, 1", "100, 3600, 1",
        "3000, 5, 5"}) // where a third look, 2 s after the second, would make the quiet time full
    void givesUpInTimeHoweverSeldomItChecksAndThoughItIsQuietButNotForLong(int checkMs, int quietSeconds,
            int maxWaitSeconds) {
        Map<String, String> settings = settings(checkMs, quietSeconds);
        settings.put("MAX_WAIT_SECONDS", String.valueOf(maxWaitSeconds));
        try (Hook hook = Hook.start(settings)) {
            assertThat(hook.exitCode()).isEqualTo(124);
            Duration limit = Duration.ofSeconds(maxWaitSeconds);
            assertThat(hook.age()).isBetween(limit, limit.plus(MARGIN));
            assertThat(hook.messages("warning")).hasSize(2).last().asString().endsWith("Giving up after"
                    + " MAX_WAIT_SECONDS, " + maxWaitSeconds + " s: 0 connections to port " + server.port()
                    + "; nothing listens on buildkitd.sock.");
        }
    }

    @Test
    void givesUpAtMaxWaitSecondsAndSaysWhoWasConnected() {
        Server.Connection build = server.connect();
        Map<String, String> settings = settings(100, 1);
        settings.put("MAX_WAIT_SECONDS", "2");
        try (Hook hook = Hook.start(settings)) {
            assertThat(hook.exitCode()).isEqualTo(124);
            assertThat(hook.age()).isBetween(Duration.ofSeconds(2), Duration.ofSeconds(2).plus(MARGIN));
            assertThat(hook.messages("warning")).singleElement().asString().startsWith("[PreStop Hook] Giving up after"
                    + " MAX_WAIT_SECONDS, 2 s: 1 connection to port " + server.port() + " from 127.0.0.1:"
                    + build.client().getLocalPort());
        }
    }
}
