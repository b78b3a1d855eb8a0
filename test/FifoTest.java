import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.nio.file.*;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The hook as a sidecar: it serves readers of a FIFO, which are the preStop hook of buildkitd's container. */
class FifoTest {

    private final Server server = Server.start();
    private final List<Hook> started = new ArrayList<>();
    private final Path fifo;
    private final Map<String, String> settings = Hook.quick(server.port());

    FifoTest(@TempDir Path directory) {
        fifo = directory.resolve("-x");
        settings.put("PATH", Tools.only(directory.resolve("bin"),
                Map.of("sh", Tools.require("sh"), "mkfifo", Tools.require("mkfifo"))));
    }

    @AfterEach
    void endAll() {
        started.forEach(Hook::close);
        server.close();
    }

    // ---- What the README's preStop hook gets -----------------------------------------------------------------------

    @Test
    void eachReaderWaitsForAQuietTimeOfItsOwnInEveryShell() {
        Tools.require("busybox");
        Hook sidecar = startReady();
        for (String shell : List.of("dash", "bash", "busybox ash")) {
            Server.Connection build = server.connect();
            assertServedWhenItEnds(build, sidecar, read(shell));
            awaitFifo();
        }
        assertThat(sidecar.messages("warning")).isEmpty();
    }

    @Test
    void twoReadersAtOnceAreBothServedAndNoneBeforeTheBuildHasEnded() {
        Hook sidecar = startReady();
        Server.Connection build = server.connect();
        assertServedWhenItEnds(build, sidecar, read("sh"), read("sh"));
    }

    @Test
    void thatAReaderWasKilledIsNoticedWhileItWaitsAndTheNextOneIsServedAtOnceWithAWaitOfItsOwn() {
        Hook sidecar = startReady();
        Server.Connection build = server.connect();
        Duration shortest = Duration.ofDays(1);
        for (int killed = 1; killed <= 3; killed++) {
            Hook reader = read("sh");
            sidecar.awaitChecks("1", Collections.frequency(sidecar.checks(), "1") + 5);
            reader.close();
            int times = killed;
            Hook.waitUntil("it is noticed", () -> gone(sidecar) == times);
            Duration noticed = sidecar.age();
            awaitFifo();
            Duration pause = sidecar.age().minus(noticed);
            shortest = pause.compareTo(shortest) < 0 ? pause : shortest;
        }
        assertThat(shortest).as("it makes no pause").isLessThan(Duration.ofMillis(900));
        assertServedWhenItEnds(build, sidecar, read("sh"));
        assertThat(sidecar.messages("warning")).isEmpty();
    }

    private long gone(Hook sidecar) {
        return sidecar.messages("info").stream()
                .filter(line -> line.contains("The reader of " + fifo + " has gone: ")).count();
    }

    @Test
    void aReaderGoesOnWaitingWhenASignalEndsTheHookAndIsServedByTheNextOne() {
        Server.Connection build = server.connect();
        Hook reader = null;
        for (int signal : List.of(9, 15)) {
            Hook sidecar = start();
            reader = reader == null ? read("sh") : reader;
            sidecar.awaitChecks("1", 5);
            Hook.run(List.of("sh", "-c", "kill -" + signal + " " + sidecar.process().pid()), Map.of());
            assertThat(sidecar.exitCode()).isEqualTo(128 + signal);
            Hook.pause(1500); // the reader has come again
        }
        assertServedWhenItEnds(build, start(), reader);
    }

    @Test
    void aReaderGetsALineWhenTheWaitIsGivenUpAndTheNextOneHasAllTheTimeAgain() {
        start("--max-wait-seconds=2");
        server.connect();
        for (int drain = 1; drain <= 2; drain++) {
            awaitFifo();
            Hook.pause(2100); // idle: this time counts for nobody
            Hook reader = read("sh");
            assertThat(reader.exitCode()).isZero();
            assertThat(reader.out()).containsExactly("gave up");
            assertThat(reader.age()).isGreaterThan(Duration.ofMillis(1900));
        }
    }

    // ---- The FIFO --------------------------------------------------------------------------------------------------

    @Test
    void beforeAReaderComesNothingIsLookedAtNoTimeIsUsedAndSigtermEndsItAtOnce() {
        Hook sidecar = startReady();
        Hook.pause(1000); // the JVM has come to rest
        Duration used = sidecar.process().info().totalCpuDuration().orElseThrow();
        Hook.pause(3000);
        assertThat(sidecar.process().info().totalCpuDuration().orElseThrow().minus(used))
                .isLessThan(Duration.ofMillis(100));
        assertThat(sidecar.checks()).isEmpty();
        sidecar.process().destroy();
        assertThat(sidecar.exitCode()).isEqualTo(143);
    }

    @Test
    void aFifoThatIsLeftOverIsKeptAndItsReaderServedThoughItsNameBeginsLikeAFlag() {
        assertThat(Hook.run(List.of("mkfifo", fifo.toString()), Map.of()).exitCode()).isZero();
        Hook reader = read("sh"); // which no other FIFO's writer would reach
        Hook sidecar = startIn(fifo.getParent(), "--sidecar=" + fifo.getFileName());
        assertThat(reader.exitCode()).isZero();
        assertThat(reader.out()).containsExactly("quiet");
        awaitFifo();
        assertThat(sidecar.messages("warning")).isEmpty();
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void whatIsNoFifoIsNotWrittenToAndIsComplainedOfOnce(boolean isLink) throws IOException {
        Path file = Files.createFile(isLink ? fifo.resolveSibling("file") : fifo);
        if (isLink) { Files.createSymbolicLink(fifo, file); }
        Hook sidecar = start();
        sidecar.awaitLog("Could not serve " + fifo);
        Hook reader = read("sh");
        Hook.pause(2500); // it has tried again twice
        assertThat(reader.process().isAlive()).isTrue();
        assertThat(sidecar.messages("warning")).singleElement().asString().contains("File exists");
        Files.delete(fifo);
        assertThat(reader.exitCode()).isZero();
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    private Hook start(String... flags) {
        return startIn(Hook.REPOSITORY, Stream.concat(Stream.of("--sidecar=" + fifo), Stream.of(flags))
                .toArray(String[]::new));
    }

    /** Starts the sidecar with a umask that would let nobody else read its FIFO. */
    private Hook startIn(Path directory, String... flags) {
        List<String> umask = List.of("sh", "-c", "umask 077; cd \"$0\"; exec \"$@\" --debug", directory.toString());
        return keep(Hook.startWith(umask, settings, flags));
    }

    private Hook startReady() {
        Hook sidecar = start();
        awaitFifo();
        return sidecar;
    }

    /** Starts a reader: the README's line. */
    private Hook read(String shell) {
        List<String> command = new ArrayList<>(List.of(shell.split(" ")));
        command.addAll(List.of("-c", "until read quiet <'" + fifo + "'; do sleep 1; done; echo \"$quiet\""));
        return keep(Hook.run(command, Map.of()));
    }

    private Hook keep(Hook hook) {
        started.add(hook);
        return hook;
    }

    /** As the startup probe does. Its mode comes a moment later. */
    private void awaitFifo() {
        Hook.waitUntil(fifo + " is there, for every user", () -> {
            try {
                return Files.getPosixFilePermissions(fifo).equals(PosixFilePermissions.fromString("rw-rw-rw-"));
            } catch (IOException e) {
                return false;
            }
        });
    }

    /** Asserts that the readers wait for the build, and for as many checks as would have let them go without it. */
    private void assertServedWhenItEnds(Server.Connection build, Hook sidecar, Hook... readers) {
        sidecar.awaitChecks("1", Collections.frequency(sidecar.checks(), "1") + 14); // the quiet time has 11
        assertThat(readers).allMatch(reader -> reader.process().isAlive());
        assertThat(fifo).as("whoever asks for it sees that the pod drains").doesNotExist();
        int quiet = Collections.frequency(sidecar.checks(), "0");
        build.close();
        assertThat(readers).allMatch(reader -> reader.exitCode() == 0);
        if (readers.length == 1) { // two of one pipe may share the letters of the line, and one gets its end
            assertThat(readers[0].out()).containsExactly("quiet");
        }
        sidecar.awaitChecks("0", quiet + 11);
    }
}
