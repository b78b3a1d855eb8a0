import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** The hook as a sidecar: it serves readers of a FIFO, which are the preStop hook of buildkitd's container. */
class FifoTest {

    private static final String QUIET = "All build processes seem to have stopped";

    @TempDir
    private Path directory;
    private Path fifo;
    private final Server server = Server.start();
    private final List<Hook> started = new ArrayList<>();

    @BeforeEach
    void nameFifo() {
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
        for (int drain = 1; drain <= 3; drain++) {
            Server.Connection build = server.connect();
            Hook reader = read(shell);
            awaitDrain(sidecar, drain);
            sidecar.awaitChecks("1", 60 * drain); // more than the quiet time needs
            assertThat(reader.process().isAlive()).isTrue();
            assertThat(fifo).as("whoever asks for it sees that the pod drains").doesNotExist();
            build.close();
            assertThat(reader.exitCode()).isZero();
            assertThat(reader.out()).containsExactly("quiet");
            awaitFifo();
            awaitLines(sidecar, "info", QUIET, drain);
        }
        assertThat(sidecar.messages("warning")).isEmpty();
    }

    @Test
    void aReaderOfAnotherUserIsServedWhateverTheUmask() {
        Tools.requireRoot();
        Tools.openToEveryone(directory);
        List<String> command = new ArrayList<>(List.of("sh", "-c", "umask 077; exec \"$@\"", "sh"));
        command.addAll(Hook.javaCommand());
        command.add("--sidecar=" + fifo);
        Hook sidecar = keep(Hook.run(command, settings()));
        awaitFifo();
        Server.Connection build = server.connect();
        List<String> reading = new ArrayList<>(Tools.nobody());
        reading.addAll(reading("sh"));
        Hook reader = keep(Hook.run(reading, Map.of()));
        sidecar.awaitChecks("1", 60);
        assertThat(reader.process().isAlive()).isTrue();
        build.close();
        assertThat(reader.exitCode()).isZero();
    }

    @Test
    void twoReadersAtOnceAreBothServedAndNoneBeforeTheBuildHasEnded() {
        Hook sidecar = startReady();
        Server.Connection build = server.connect();
        Hook one = read("sh");
        Hook two = read("sh");
        sidecar.awaitChecks("1", 60);
        assertThat(one.process().isAlive() && two.process().isAlive()).isTrue();
        build.close();
        assertThat(one.exitCode()).isZero();
        assertThat(two.exitCode()).isZero();
    }

    @Test
    void aReaderThatIsKilledLeavesNothingForTheNextOne() {
        Hook sidecar = startReady();
        Hook killed = read("sh");
        awaitDrain(sidecar, 1);
        killed.close();
        Server.Connection build = server.connect(); // after this, the first wait must not let anybody go
        Hook next = read("sh");
        sidecar.awaitChecks("1", 60);
        assertThat(next.process().isAlive()).isTrue();
        build.close();
        assertThat(next.exitCode()).isZero();
        assertThat(sidecar.messages("warning")).singleElement().asString().contains("Could not serve " + fifo);
    }

    @Test
    void aReaderGoesOnWaitingWhenTheHookIsKilledAndIsServedByTheNextOne() {
        Hook sidecar = startReady();
        Server.Connection build = server.connect();
        Hook reader = read("sh");
        sidecar.awaitChecks("1", 10);
        sidecar.close(); // with SIGKILL
        Hook.pause(2500); // the reader has come again twice
        assertThat(reader.process().isAlive()).isTrue();
        Hook restarted = start();
        restarted.awaitChecks("1", 60);
        assertThat(reader.process().isAlive()).isTrue();
        build.close();
        assertThat(reader.exitCode()).isZero();
        assertThat(reader.out()).containsExactly("quiet");
    }

    @Test
    void aReaderGetsALineWhenTheWaitIsGivenUpAndTheNextOneHasAllTheTimeAgain() {
        Map<String, String> settings = settings();
        settings.put("MAX_WAIT_SECONDS", "2");
        Hook sidecar = start(settings);
        awaitFifo();
        Hook.pause(2500); // idle: this time counts for nobody
        Server.Connection build = server.connect();
        for (int drain = 1; drain <= 2; drain++) {
            Hook reader = read("sh");
            assertThat(reader.exitCode()).isZero();
            assertThat(reader.out()).containsExactly("gave up");
            assertThat(reader.age().toMillis()).isGreaterThan(1900);
            awaitLines(sidecar, "warning", "Giving up after MAX_WAIT_SECONDS, 2 s: 1 connection", drain);
            awaitFifo();
        }
        build.close();
        assertThat(read("sh").exitCode()).isZero();
    }

    // ---- The FIFO --------------------------------------------------------------------------------------------------

    @Test
    void beforeAReaderComesNothingIsLookedAtAndNoTimeIsUsed() throws IOException {
        Hook sidecar = startReady();
        Hook.pause(1000); // the JVM has come to rest
        long before = cpuTicks(sidecar);
        Hook.pause(3000);
        assertThat(cpuTicks(sidecar) - before).as("hundredths of a second").isLessThan(10);
        assertThat(sidecar.checks()).isEmpty();
    }

    @Test
    void aFifoThatIsLeftOverIsKeptAndItsReaderServed() throws Exception {
        assertThat(new ProcessBuilder("mkfifo", fifo.toString()).start().waitFor()).isZero();
        Hook reader = read("sh"); // which no other FIFO's writer would reach
        Hook sidecar = start();
        assertThat(reader.exitCode()).isZero();
        assertThat(sidecar.messages("warning")).isEmpty();
    }

    @ParameterizedTest
    @ValueSource(strings = {"a file", "a directory", "a link to a file"})
    void whatIsNoFifoIsNotWrittenToAndIsComplainedOfOnce(String what) throws IOException {
        Path file = Files.writeString(directory.resolve("file"), "");
        switch (what) {
            case "a file" -> Files.move(file, fifo);
            case "a directory" -> Files.createDirectory(fifo);
            default -> Files.createSymbolicLink(fifo, file);
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

    @Test
    void aDirectoryThatIsGoneForAWhileIsWaitedFor() throws IOException {
        fifo = directory.resolve("gone/quiet");
        Hook sidecar = start();
        sidecar.awaitLog("Could not serve " + fifo);
        Files.createDirectory(fifo.getParent());
        Hook reader = read("sh");
        assertThat(reader.exitCode()).isZero();
        assertThat(sidecar.messages("warning")).hasSize(1);
    }

    @Test
    void aDirectoryThatIsFullForAWhileIsWaitedFor() throws IOException {
        Tools.requireRoot();
        Path full = Files.createDirectory(directory.resolve("full"));
        List<String> command = new ArrayList<>(List.of("unshare", "--mount", "sh", "-c",
                "mount -t tmpfs -o nr_inodes=2 none \"$0\" && touch \"$0/x\" && exec \"$@\"", full.toString()));
        command.addAll(Hook.javaCommand());
        command.add("--sidecar=" + full + "/quiet");
        Hook sidecar = keep(Hook.run(command, settings()));
        sidecar.awaitLog("No space left on device");
        Path inside = Path.of("/proc", "" + sidecar.process().pid(), "root" + full); // as the hook sees it
        Files.delete(inside.resolve("x"));
        fifo = inside.resolve("quiet");
        assertThat(read("sh").exitCode()).isZero();
    }

    // ---- How it is ended -------------------------------------------------------------------------------------------

    @ParameterizedTest
    @ValueSource(booleans = {false, true})
    void sigtermEndsItAtOnceWhetherItWaitsForAReaderOrForABuild(boolean draining) throws IOException {
        Hook sidecar = startReady();
        Server.Connection build = server.connect();
        if (draining) {
            read("sh");
            sidecar.awaitChecks("1", 3);
        } else {
            Hook.waitUntil("it blocks in open(2)", () -> blocksInOpen(sidecar));
        }
        sidecar.process().destroy();
        assertThat(sidecar.exitCode()).isEqualTo(143);
        assertThat(build.server().isClosed()).isFalse();
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    private Map<String, String> settings() {
        Map<String, String> env = Hook.quick(server.port());
        env.put("DEBUG", "1");
        return env;
    }

    private Hook start(Map<String, String> settings) {
        return keep(Hook.start(settings, "--sidecar=" + fifo));
    }

    private Hook start() {
        return start(settings());
    }

    private Hook startReady() {
        Hook sidecar = start();
        awaitFifo();
        return sidecar;
    }

    /** The README's line. */
    private List<String> reading(String shell) {
        List<String> words = List.of(shell.split(" "));
        List<String> command = new ArrayList<>(List.of(Tools.require(words.get(0)).toString()));
        command.addAll(words.subList(1, words.size()));
        command.addAll(List.of("-c", "until read quiet <'" + fifo + "'; do sleep 1; done; echo \"$quiet\""));
        return command;
    }

    private Hook read(String shell) {
        return keep(Hook.run(reading(shell), Map.of()));
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

    private static void awaitDrain(Hook sidecar, int number) {
        awaitLines(sidecar, "info", "Waiting for build processes", number);
    }

    /** Waits until just so many lines of this level hold the text: the log comes a moment after what it tells of. */
    private static void awaitLines(Hook sidecar, String level, String text, int number) {
        Hook.waitUntil(number + " lines say: " + text, () -> sidecar.messages(level).stream()
                .filter(line -> line.contains(text)).count() == number);
    }

    private static long cpuTicks(Hook hook) throws IOException {
        String stat = Files.readString(Path.of("/proc", "" + hook.process().pid(), "stat"));
        return Stream.of(stat.substring(stat.lastIndexOf(')') + 2).split(" ")).skip(11).limit(4)
                .mapToLong(Long::parseLong).sum();
    }

    /** Whether one of its threads waits for the other end of a FIFO, as Linux' fs/pipe.c calls it. */
    private static boolean blocksInOpen(Hook hook) {
        try (Stream<Path> threads = Files.list(Path.of("/proc", "" + hook.process().pid(), "task"))) {
            for (Path thread : threads.toList()) {
                if (Files.readString(thread.resolve("syscall")).matches("(?s)(2|257) .*")) {
                    return true;
                }
            }
        } catch (IOException e) {
            // a thread has just ended
        }
        return false;
    }
}
