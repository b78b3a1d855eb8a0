import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.nio.file.*;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The hook as a sidecar: it serves readers of a FIFO, which are the preStop hook of buildkitd's container. */
class FifoTest {

    private final Server server = Server.start();
    private final List<Hook> started = new ArrayList<>();
    private final Path fifo;

    FifoTest(@TempDir Path directory) {
        fifo = directory.resolve("quiet");
    }

    @AfterEach
    void endAll() {
        started.forEach(Hook::close);
        server.close();
    }

    // ---- What the README's preStop hook gets -----------------------------------------------------------------------

    @ParameterizedTest
    @ValueSource(strings = {"dash", "bash", "busybox ash"})
    void eachReaderWaitsForAQuietTimeOfItsOwn(String shell) {
        Hook sidecar = startReady();
        for (int drain = 1; drain <= 2; drain++) {
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
    void aReaderThatIsKilledLeavesNothingForTheNextOne() {
        Hook sidecar = startReady();
        Hook killed = read("sh");
        sidecar.awaitLog("Waiting for build processes");
        killed.close();
        Server.Connection build = server.connect(); // after this, the first wait must not let anybody go
        assertServedWhenItEnds(build, sidecar, read("sh"));
        assertThat(sidecar.messages("warning")).singleElement().asString().contains("Could not serve " + fifo);
    }

    @ParameterizedTest
    @ValueSource(ints = {9, 15})
    void aReaderGoesOnWaitingWhenASignalEndsTheHookAndIsServedByTheNextOne(int signal) {
        Hook sidecar = startReady();
        Server.Connection build = server.connect();
        Hook reader = read("sh");
        sidecar.awaitChecks("1", 10);
        if (signal == 9) {
            sidecar.process().destroyForcibly();
        } else {
            sidecar.process().destroy();
        }
        assertThat(sidecar.exitCode()).isEqualTo(128 + signal);
        Hook.pause(2500); // the reader has come again twice
        assertServedWhenItEnds(build, start(), reader);
    }

    @Test
    void aReaderGetsALineWhenTheWaitIsGivenUpAndTheNextOneHasAllTheTimeAgain() {
        start("--max-wait-seconds=2");
        server.connect();
        for (int drain = 1; drain <= 2; drain++) {
            awaitFifo();
            Hook.pause(2500); // idle: this time counts for nobody
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
    void aFifoThatIsLeftOverIsKeptAndItsReaderServed() {
        assertThat(Hook.run(List.of("mkfifo", fifo.toString()), Map.of()).exitCode()).isZero();
        Hook reader = read("sh"); // which no other FIFO's writer would reach
        Hook sidecar = start();
        assertThat(reader.exitCode()).isZero();
        assertThat(reader.out()).containsExactly("quiet");
        assertThat(sidecar.messages("warning")).isEmpty();
    }

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void whatIsNoFifoIsNotWrittenToAndIsComplainedOfOnce(boolean isLink) throws IOException {
        Path file = Files.createFile(isLink ? fifo.resolveSibling("file") : fifo);
        if (isLink) {
            Files.createSymbolicLink(fifo, file);
        }
        Hook sidecar = start();
        sidecar.awaitLog("Could not serve " + fifo);
        Hook reader = read("sh");
        Hook.pause(2500);
        assertThat(reader.process().isAlive()).isTrue();
        assertThat(sidecar.messages("warning")).singleElement().asString().contains("File exists");
        Files.delete(fifo);
        assertThat(reader.exitCode()).isZero();
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    /** Starts the sidecar with a umask that would let nobody else read its FIFO. */
    private Hook start(String... flags) {
        List<String> umask = List.of("sh", "-c", "umask 077; exec \"$@\" --debug --sidecar=\"$0\"", fifo.toString());
        return keep(Hook.startWith(umask, Hook.quick(server.port()), flags));
    }

    private Hook startReady() {
        Hook sidecar = start();
        awaitFifo();
        return sidecar;
    }

    /** Starts a reader: the README's line. */
    private Hook read(String shell) {
        List<String> command = new ArrayList<>(List.of(shell.split(" ")));
        Tools.require(command.get(0));
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
        sidecar.awaitChecks("1", Collections.frequency(sidecar.checks(), "1") + 60); // the quiet time has 50
        assertThat(readers).allMatch(reader -> reader.process().isAlive());
        assertThat(fifo).as("whoever asks for it sees that the pod drains").doesNotExist();
        build.close();
        assertThat(readers).allMatch(reader -> reader.exitCode() == 0);
    }
}
