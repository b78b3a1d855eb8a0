import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.io.UncheckedIOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.opentest4j.TestAbortedException;

/**
 * The hook beside a real BuildKit: the one inside dockerd, which needs no image from a registry. The client is docker,
 * and the images hold nothing but BusyBox.
 *
 * A build by docker holds two connections from its first to its last moment: the request for the build, whose answer
 * is the progress, and the session, over which the daemon fetches the files. (On buildkitd's own port one connection
 * carries both.) So the tests ask for connections, not for a number of them.
 */
@Timeout(180) // a test may have to wait for its port
class BuildTest {

    private static final int QUIET_SECONDS = 2;
    /** For a test in which a client starts in the quiet time, which takes it a while on a busy machine. */
    private static final int LONG_QUIET_SECONDS = 8;
    /** So many checks make the quiet time. */
    private static final int CHECKS_NEEDED = 20;

    @TempDir
    private static Path directory;
    private static Dockerd dockerd;
    private static List<String> javaForEveryone;
    private static TestAbortedException missing;

    @BeforeAll
    static void startDockerd() throws IOException {
        try {
            Tools.openToEveryone(directory);
            dockerd = Dockerd.start(directory.toRealPath());
        } catch (TestAbortedException e) {
            missing = e;
        }
    }

    /** Each test by itself, because those of a class that is skipped as a whole are not counted as skipped. */
    @BeforeEach
    void needsDockerd() {
        if (missing != null) {
            throw missing;
        }
    }

    @AfterAll
    static void stopDockerd() {
        if (dockerd != null) {
            dockerd.close();
        }
    }

    // ---- The tests -------------------------------------------------------------------------------------------------

    @Test
    void staysWhileABuildRuns() {
        try (Port port = dockerd.takePort(); Build build = Build.start(port).awaitRunning();
                Drain drain = Drain.start(port)) {
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
            assertThat(build.finish()).isZero();
            drain.assertLeftAfter(build);
        }
    }

    @Test
    void staysWhenABuildComesLate() {
        try (Port port = dockerd.takePort(); Drain drain = Drain.start(port, LONG_QUIET_SECONDS)) {
            drain.awaitChecks(3, false);
            try (Build build = Build.start(port).awaitRunning()) {
                drain.awaitChecks(1, true);
                assertThat(build.finish()).isZero();
                drain.assertLeftAfter(build);
            }
        }
    }

    @Test
    void staysUntilTheLastOfTwoOverlappingBuildsHasEnded() {
        try (Port port = dockerd.takePort(); Build first = Build.start(port).awaitRunning();
                Drain drain = Drain.start(port)) {
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
            try (Build second = Build.start(port).awaitRunning()) {
                assertThat(first.finish()).isZero();
                drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
                assertThat(second.finish()).isZero();
                drain.assertLeftAfter(second);
            }
        }
    }

    @Test
    void staysThroughAPauseThatIsShorterThanTheQuietTime() {
        try (Port port = dockerd.takePort(); Build first = Build.start(port).awaitRunning();
                Drain drain = Drain.start(port, LONG_QUIET_SECONDS)) {
            drain.awaitChecks(1, true);
            assertThat(first.finish()).isZero();
            drain.awaitChecks(4, false);
            try (Build second = Build.start(port).awaitRunning()) {
                drain.awaitChecks(1, true);
                assertThat(second.finish()).isZero();
                drain.assertLeftAfter(second);
            }
        }
    }

    @Test
    void leavesAfterABuildThatFailed() {
        try (Port port = dockerd.takePort(); Build build = Build.start(port, 1).awaitRunning();
                Drain drain = Drain.start(port)) {
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
            assertThat(build.finish()).isEqualTo(1);
            drain.assertLeftAfter(build);
        }
    }

    @Test
    void leavesAfterTheClientWasKilled() {
        try (Port port = dockerd.takePort(); Build build = Build.start(port).awaitRunning();
                Drain drain = Drain.start(port)) {
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
            build.kill();
            drain.assertLeftAfter(build);
            build.awaitStepStopped(); // as BuildKit does with a build whose client has gone
        }
    }

    @Test
    void leavesAfterTheQuietTimeWhenThereIsNoBuild() {
        try (Port port = dockerd.takePort(); Drain drain = Drain.start(port)) {
            assertThat(drain.hook.exitCode()).isZero();
            assertThat(drain.checks()).hasSize(CHECKS_NEEDED).containsOnly(false);
            assertThat(drain.hook.messages("info")).noneMatch(line -> line.contains(" from "));
            assertThat(drain.hook.messages("warning")).isEmpty();
        }
    }

    @ParameterizedTest
    @CsvSource({"root, netstat", "root, ss", "root, procfs", "other, netstat", "other, ss", "other, procfs"})
    void staysWhileABuildRunsWhateverTheUserAndTheSource(String user, String source) {
        // What the hook sees of a socket must not depend on who owns it.
        List<String> java = user.equals("root") ? Hook.javaCommand() : javaOfAnotherUser();
        try (Port port = dockerd.takePort(); Build build = Build.start(port).awaitRunning();
                Drain drain = Drain.start(port, QUIET_SECONDS, java, "--source", source)) {
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
            assertThat(build.finish()).isZero();
            drain.assertLeftAfter(build);
        }
    }

    private static synchronized List<String> javaOfAnotherUser() {
        if (javaForEveryone == null) {
            javaForEveryone = new ArrayList<>(List.of(Tools.require("setpriv").toString(), "--reuid", "65534",
                    "--regid", "65534", "--clear-groups"));
            javaForEveryone.addAll(Tools.javaCommandForEveryone(directory.resolve("java")));
        }
        return javaForEveryone;
    }

    // ---- The hook --------------------------------------------------------------------------------------------------

    /** When the process ended, as System.nanoTime(). */
    private static CompletableFuture<Long> endOf(Process process) {
        return process.onExit().thenApply(ended -> System.nanoTime());
    }

    /** A run of the hook. */
    private record Drain(Hook hook, CompletableFuture<Long> end, Port port, int quietSeconds)
            implements AutoCloseable {

        static Drain start(Port port) {
            return start(port, QUIET_SECONDS);
        }

        static Drain start(Port port, int quietSeconds) {
            return start(port, quietSeconds, Hook.javaCommand());
        }

        static Drain start(Port port, int quietSeconds, List<String> java, String... args) {
            Hook hook = Hook.run(Stream.concat(java.stream(), Stream.of(args)).toList(), Hook.env("DEBUG", "1",
                    "BUILDKITD_PORT", port.number(), "CHECK_FREQUENCY_MS", quietSeconds * 1000 / CHECKS_NEEDED,
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", quietSeconds));
            return new Drain(hook, endOf(hook.process()), port, quietSeconds);
        }

        /** Waits for so many more checks that see connections, or that see none. */
        void awaitChecks(int number, boolean busy) {
            long before = checks().stream().filter(check -> check == busy).count();
            Hook.waitUntil(number + (busy ? " busy" : " quiet") + " checks", () -> !hook.process().isAlive()
                    || checks().stream().filter(check -> check == busy).count() >= before + number);
            assertThat(hook.process().isAlive()).as("the hook still waits. It said: " + hook.err()).isTrue();
        }

        /** Whether it saw connections, for each check. */
        List<Boolean> checks() {
            return hook.err().stream().filter(line -> line.contains(" Active connections to buildkitd: "))
                    .map(line -> !line.contains(" buildkitd: 0\"")).toList();
        }

        /** For a build that has just ended: asserts that the hook stayed until then, and left after the quiet time. */
        void assertLeftAfter(Build build) {
            int checksBefore = checks().size();
            assertThat(hook.exitCode()).isZero();
            // A second is more than the client needs to end when it has closed its connections.
            assertThat(Duration.ofNanos(end.join() - build.end.join())).as("from the client's end to the hook's")
                    .isGreaterThan(Duration.ofSeconds(quietSeconds - 1));
            // The latest moment to leave is told in checks. How long they take says more about the other tests.
            int busyChecks = checks().lastIndexOf(true) + 1;
            assertThat(busyChecks - checksBefore).as("busy checks after the build").isLessThanOrEqualTo(10);
            assertThat(checks().size() - busyChecks).as("quiet checks after the build").isEqualTo(CHECKS_NEEDED);
            assertThat(hook.messages("info"))
                    .anyMatch(line -> line.matches(".* connections? to port " + port.number
                            + " from 127\\.0\\.0\\.1:\\d+.*"))
                    .endsWith("[PreStop Hook] All build processes seem to have stopped. Exiting now.");
            assertThat(hook.messages("warning")).isEmpty();
            assertThat(build.imageExists()).isEqualTo(build.client.exitValue() == 0);
        }

        @Override
        public void close() {
            hook.close();
        }
    }

    // ---- The client ------------------------------------------------------------------------------------------------

    /** A build that runs until the test lets it go: its only step holds a connection to the test. */
    private static final class Build implements AutoCloseable {
        private static final AtomicInteger COUNTER = new AtomicInteger();

        private final String image = "build-" + COUNTER.incrementAndGet();
        private final Path log = dockerd.directory.resolve(image + ".log");
        private final Port port;
        private final ServerSocket gate;
        private final Process client;
        private final CompletableFuture<Long> end;
        private Socket step;

        static Build start(Port port) {
            return start(port, 0);
        }

        /** The exit code is that of the step. */
        static Build start(Port port, int exitCode) {
            try {
                return new Build(port, exitCode);
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
        }

        private Build(Port port, int exitCode) throws IOException {
            this.port = port;
            gate = new ServerSocket(0, 1, InetAddress.getByName("127.0.0.1"));
            gate.setSoTimeout((int) Hook.PATIENCE.toMillis());
            // The arguments are part of the step's environment, so none finds another's result in the cache.
            client = dockerd.docker(log, port, "build", "--network=host", "--progress=plain", "--tag", image,
                    "--build-arg", "IMAGE=" + image, "--build-arg", "GATE=" + gate.getLocalPort(),
                    "--build-arg", "EXIT=" + exitCode, dockerd.context.toString());
            end = endOf(client);
        }

        Build awaitRunning() {
            try {
                step = gate.accept();
                step.setSoTimeout((int) Hook.PATIENCE.toMillis());
                return this;
            } catch (IOException e) {
                close();
                throw new AssertionError("the build does not run:\n" + Dockerd.text(log), e);
            }
        }

        /** Lets the build end, and returns the exit code of the client. */
        int finish() {
            closeQuietly(step);
            Hook.waitUntil("the build ends", () -> !client.isAlive());
            return client.exitValue();
        }

        /** Kills the client, and the plugin that does the work in newer ones. */
        void kill() {
            List<ProcessHandle> processes = new ArrayList<>(client.descendants().toList());
            processes.add(client.toHandle());
            processes.forEach(ProcessHandle::destroyForcibly);
            Hook.waitUntil("the client ends", () -> !client.isAlive());
        }

        void awaitStepStopped() {
            try {
                step.getInputStream().readAllBytes();
            } catch (IOException e) {
                throw new AssertionError("the step still runs though the client was killed", e);
            }
        }

        boolean imageExists() {
            Process inspect = dockerd.docker(dockerd.directory.resolve(image + ".inspect"), port, "inspect", image);
            Hook.waitUntil("docker inspect ends", () -> !inspect.isAlive());
            return inspect.exitValue() == 0;
        }

        @Override
        public void close() {
            kill();
            closeQuietly(step);
            closeQuietly(gate);
        }

        private static void closeQuietly(AutoCloseable socket) {
            try {
                if (socket != null) {
                    socket.close();
                }
            } catch (Exception e) {
                // it is gone either way
            }
        }
    }

    // ---- The daemon ------------------------------------------------------------------------------------------------

    /** A port of the daemon that one test has for itself, so that its hook sees no other test's builds. */
    private record Port(int number, BlockingQueue<Integer> free) implements AutoCloseable {
        @Override
        public void close() {
            free.add(number);
        }
    }

    /** A dockerd with all its state in one directory. */
    private static final class Dockerd implements AutoCloseable {
        /** So many tests run at a time. A dockerd takes a second per port to start: it warns that there is no TLS. */
        private static final int PORTS = 4;

        private final Path directory;
        private final Path context;
        private final Path client;
        private final Process process;
        private final List<Integer> ports;
        private final BlockingQueue<Integer> free = new LinkedBlockingQueue<>();

        static Dockerd start(Path directory) throws IOException {
            Tools.requireRoot();
            Tools.require("dockerd");
            Tools.require("docker");
            Path context = Files.createDirectory(directory.resolve("context"));
            Path busybox = Files.copy(Tools.require("busybox"), context.resolve("busybox"));
            int code = exitCode(directory, List.of("chroot", context.toString(), "/busybox", "true"));
            Assumptions.assumeTrue(code == 0, "needs a busybox that is linked statically (package busybox-static)");
            Files.writeString(context.resolve("Dockerfile"), """
                    FROM scratch
                    COPY busybox /bin/busybox
                    ARG IMAGE
                    ARG GATE
                    ARG EXIT
                    RUN ["/bin/busybox", "sh", "-c", "/bin/busybox nc 127.0.0.1 $GATE && exit $EXIT"]
                    """);
            Dockerd started = new Dockerd(directory, context, findClient(directory));
            try {
                started.awaitReady();
            } catch (Throwable e) {
                started.close();
                throw e;
            }
            return started;
        }

        private Dockerd(Path directory, Path context, Path client) throws IOException {
            this.directory = directory;
            this.context = context;
            this.client = client;
            ports = freePorts();
            free.addAll(ports);
            // Nothing of a Docker that this machine may have: not its settings, networks, firewall rules, containers.
            List<String> command = new ArrayList<>(List.of("dockerd", "--storage-driver=vfs", "--bridge=none",
                    "--iptables=false", "--ip6tables=false", "--containerd-namespace=buildkit-prestop-test",
                    "--containerd-plugins-namespace=buildkit-prestop-test-plugins",
                    "--config-file=" + Files.writeString(directory.resolve("daemon.json"), "{}"),
                    "--data-root=" + directory.resolve("data"), "--exec-root=" + directory.resolve("exec"),
                    "--pidfile=" + directory.resolve("pid")));
            ports.forEach(port -> command.add("--host=tcp://127.0.0.1:" + port));
            process = run(directory, directory.resolve("dockerd.log"), command);
            Runtime.getRuntime().addShutdownHook(new Thread(this::stop)); // when the tests are interrupted
        }

        private void awaitReady() {
            try {
                for (int port : ports) {
                    Hook.waitUntil("dockerd answers", () -> !process.isAlive() || exitCode(directory,
                            List.of(client.toString(), "--host=tcp://127.0.0.1:" + port, "version")) == 0);
                }
                assertThat(process.isAlive()).as("dockerd runs").isTrue();
            } catch (AssertionError e) {
                throw new AssertionError("dockerd did not start:\n" + text(directory.resolve("dockerd.log")), e);
            }
        }

        /** Waits for a port that no other test uses. */
        Port takePort() {
            try {
                return new Port(free.take(), free);
            } catch (InterruptedException e) {
                throw new IllegalStateException(e);
            }
        }

        /** Starts the client. What it prints goes to the file. */
        Process docker(Path output, Port port, String... args) {
            List<String> command = new ArrayList<>();
            command.addAll(List.of(client.toString(), "--host=tcp://127.0.0.1:" + port.number));
            command.addAll(List.of(args));
            return run(directory, output, command);
        }

        /** The first docker on the PATH that can build with BuildKit. From version 23 on that takes a plugin. */
        private static Path findClient(Path directory) {
            Path output = directory.resolve("version");
            for (String place : (System.getenv("PATH") + ":/usr/bin").split(":")) {
                Path docker = Path.of(place, "docker");
                if (Files.isExecutable(docker) && exitCode(directory, output, List.of(docker.toString(), "-v")) == 0) {
                    Matcher version = Pattern.compile("Docker version (\\d+).*").matcher(text(output).strip());
                    if (version.matches() && (Integer.parseInt(version.group(1)) < 23
                            || exitCode(directory, List.of(docker.toString(), "buildx", "version")) == 0)) {
                        return docker;
                    }
                }
            }
            return Assumptions.abort("needs a docker that can build with BuildKit (from 23 on: docker-buildx)");
        }

        /** Ports below those that the kernel gives to clients, so that no other test's connection takes one. */
        private static List<Integer> freePorts() {
            List<Integer> found = new ArrayList<>();
            while (found.size() < PORTS) {
                int port = ThreadLocalRandom.current().nextInt(10_000, 32_000);
                try (ServerSocket socket = new ServerSocket(port, 1, InetAddress.getByName("127.0.0.1"))) {
                    if (!found.contains(port)) {
                        found.add(port);
                    }
                } catch (IOException e) {
                    // somebody has it
                }
            }
            return found;
        }

        @Override
        public void close() {
            stop();
            // What dockerd could not unmount must not be in the way of deleting the directory, nor be deleted with it.
            List<String> mounts = new ArrayList<>(Stream.of(text(Path.of("/proc/self/mounts")).split("\n"))
                    .map(line -> line.split(" ")[1]).filter(mount -> mount.startsWith(directory + "/")).toList());
            Collections.reverse(mounts);
            for (String mount : mounts) {
                assertThat(exitCode(directory, List.of("umount", mount))).as("umount " + mount).isZero();
            }
        }

        /** Ends dockerd, its containerd, and whatever they still run. */
        private void stop() {
            List<ProcessHandle> processes = new ArrayList<>(process.descendants().toList());
            processes.add(process.toHandle());
            process.destroy();
            try {
                process.waitFor(15, TimeUnit.SECONDS);
            } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
            }
            processes.forEach(ProcessHandle::destroyForcibly);
            Hook.waitUntil("dockerd's processes end", () -> processes.stream().noneMatch(ProcessHandle::isAlive));
        }

        private static int exitCode(Path directory, List<String> command) {
            return exitCode(directory, directory.resolve("output"), command);
        }

        private static int exitCode(Path directory, Path output, List<String> command) {
            try {
                return run(directory, output, command).waitFor();
            } catch (InterruptedException e) {
                throw new IllegalStateException(e);
            }
        }

        /** Starts a command in an environment that holds no settings for Docker but BuildKit. */
        private static Process run(Path directory, Path output, List<String> command) {
            ProcessBuilder builder = new ProcessBuilder(command).redirectErrorStream(true)
                    .redirectOutput(output.toFile());
            builder.environment().clear();
            builder.environment().putAll(Map.of("PATH", System.getenv("PATH"), "HOME", directory.toString(),
                    "DOCKER_CONFIG", directory.resolve("config").toString(), "DOCKER_BUILDKIT", "1"));
            try {
                return builder.start();
            } catch (IOException e) {
                throw new UncheckedIOException(e);
            }
        }

        private static String text(Path file) {
            try {
                return Files.readString(file);
            } catch (IOException e) {
                return e.toString();
            }
        }
    }
}
