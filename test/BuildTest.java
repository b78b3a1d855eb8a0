import static org.assertj.core.api.Assertions.assertThat;

import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.Arguments;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.MethodSource;
import org.opentest4j.TestAbortedException;

/**
 * The hook beside a real BuildKit: the one inside dockerd, which needs no image from a registry. The clients are those
 * of every docker that Dockerd.Docker finds, old and modern, and the images hold nothing but BusyBox.
 *
 * A build by docker holds several connections from its first to its last moment: the request for the build, whose
 * answer is the progress, the session, over which the daemon fetches the files, and buildx's own. (On buildkitd's
 * addresses one connection carries all.) So the tests ask for connections, not for a number of them.
 */
class BuildTest {

    private static final int QUIET_SECONDS = 2;
    /** For a test in which a client starts in the quiet time, which takes it a while on a busy machine. */
    private static final int LONG_QUIET_SECONDS = 8;
    /** So many checks make the quiet time. */
    private static final int CHECKS_NEEDED = 20;

    @TempDir
    private static Path directory;
    private static Path context;
    private static final List<Dockerd> dockerds = new ArrayList<>();
    private static List<String> javaOfAnotherUser;
    private static TestAbortedException missing;

    @BeforeAll
    static void startDockerds() throws IOException {
        try {
            Tools.requireRoot();
            Tools.openToEveryone(directory);
            directory = directory.toRealPath();
            javaOfAnotherUser = new ArrayList<>(Tools.nobody());
            javaOfAnotherUser.addAll(Tools.javaCommandForEveryone(directory.resolve("java")));
            context = Files.createDirectory(directory.resolve("context"));
            Files.copy(Tools.require("busybox"), context.resolve("busybox"));
            Assumptions.assumeTrue(Hook.run(List.of("chroot", context.toString(), "/busybox", "true"), Map.of())
                    .exitCode() == 0, "needs a busybox that is linked statically (package busybox-static)");
            Files.writeString(context.resolve("Dockerfile"), Dockerd.Gate.DOCKERFILE);
            // Its steps have no network, because bake uses the host's only with consent, which old ones do not know.
            Files.writeString(context.resolve("bake.hcl"), """
                    target "first" {
                        no-cache = true
                        dockerfile-inline = <<EOF
                            ARG BASE=scratch
                            FROM $BASE
                            COPY busybox /bin/busybox
                            RUN --network=none ["/bin/busybox", "sleep", "5"]
                        EOF
                    }
                    target "second" {
                        inherits = ["first"]
                        contexts = { first = "target:first" }
                        args = { BASE = "first" }
                    }
                    """);
            for (Dockerd.Docker docker : Dockerd.Docker.installed(directory)) {
                dockerds.add(new Dockerd(docker, Files.createTempDirectory(directory, "dockerd")));
                System.out.println("BuildTest runs " + docker.versions);
            }
            dockerds.forEach(Dockerd::awaitReady);
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
    static void stopDockerds() {
        dockerds.forEach(Dockerd::close);
    }

    /** What a client connects to. */
    enum Over { TCP, SOCKET }

    /** A docker that builds over one of the two. */
    record Way(Dockerd dockerd, Over over) {
        @Override
        public String toString() {
            return dockerd.docker.versions + " over " + over;
        }
    }

    static Stream<Way> ways() {
        return missing != null ? Stream.of((Way) null) // which runs no test, but is told
                : dockerds.stream().flatMap(dockerd -> Stream.of(Over.values()).map(over -> new Way(dockerd, over)));
    }

    private static Dockerd newest() {
        return dockerds.get(dockerds.size() - 1);
    }

    // ---- The tests -------------------------------------------------------------------------------------------------

    @ParameterizedTest
    @MethodSource("ways")
    void staysWhileABuildSendsNothingForTwentySeconds(Way way) {
        try (Dockerd.Address address = way.dockerd.takeAddress(); Build build = Build.start(address, way.over);
                Drain drain = Drain.start(address)) {
            Hook.pause(20_000);
            drain.awaitChecks(1, true);
            assertThat(build.finish(0)).isZero();
            drain.assertLeftAfter(build);
            assertThat(drain.checks().subList(0, drain.busyUntil())).doesNotContain(false);
        }
    }

    @ParameterizedTest
    @MethodSource("ways")
    void staysThroughAPauseThatIsShorterThanTheQuietTime(Way way) {
        try (Dockerd.Address address = way.dockerd.takeAddress(); Build first = Build.start(address, way.over);
                Drain drain = Drain.start(address, LONG_QUIET_SECONDS, Hook.javaCommand())) {
            drain.awaitChecks(1, true);
            assertThat(first.finish(0)).isZero();
            drain.awaitChecks(4, false);
            try (Build second = Build.start(address, way.over)) {
                drain.awaitChecks(1, true);
                assertThat(second.finish(0)).isZero();
                drain.assertLeftAfter(second);
            }
        }
    }

    /** How a build may end but for well: it fails, or its client gets SIGINT or SIGKILL. */
    enum End { ERROR, INT, KILL }

    static Stream<Arguments> waysAndEnds() {
        return ways().flatMap(way -> Stream.of(End.values()).map(end -> Arguments.of(way, end)));
    }

    @ParameterizedTest
    @MethodSource("waysAndEnds")
    void leavesAfterABuildThatCameToABadEnd(Way way, End end) {
        try (Dockerd.Address address = way.dockerd.takeAddress(); Build build = Build.start(address, way.over);
                Drain drain = Drain.start(address)) {
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the build it would have left
            int code = end == End.ERROR ? build.finish(1) : build.signal(end.name());
            assertThat(code).isNotZero();
            drain.assertLeftAfter(build);
            build.gate.awaitStepStopped(); // as BuildKit does with a build whose client has gone
        }
    }

    @ParameterizedTest
    @EnumSource
    void staysUntilTheSecondTargetOfABakeIsBuilt(Over over) {
        Assumptions.assumeTrue(newest().docker.hasBuildx,
                "needs docker 23 or newer with buildx, on the PATH or in MODERN_DOCKER");
        try (Dockerd.Address address = newest().takeAddress(); Build bake = new Build(address, over, true);
                Drain drain = Drain.start(address)) {
            drain.awaitChecks(1, true);
            assertThat(bake.client.exitCode()).isZero();
            drain.assertLeftAfter(bake);
            assertThat(drain.checks().subList(0, drain.busyUntil())).doesNotContain(false);
        }
    }

    @ParameterizedTest
    @CsvSource({"root, netstat", "root, ss", "root, procfs", "root, auto",
        "other, netstat", "other, ss", "other, procfs", "other, auto"})
    void staysUntilTheLastBuildHasEndedWhateverTheUserAndTheSource(String user, String source) {
        // What the hook sees of a socket must not depend on who owns it.
        List<String> java = user.equals("root") ? Hook.javaCommand() : javaOfAnotherUser;
        try (Dockerd.Address address = newest().takeAddress(); Build first = Build.start(address, Over.TCP);
                Build second = Build.start(address, Over.SOCKET);
                Drain drain = Drain.start(address, QUIET_SECONDS, java, "--source", source)) {
            drain.awaitChecks(1, true);
            assertThat(first.finish(0)).isZero();
            drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the one over the socket it would have left
            try (Build third = Build.start(address, Over.TCP)) {
                assertThat(second.finish(0)).isZero();
                drain.awaitChecks(CHECKS_NEEDED + 5, true); // without the one over TCP it would have left
                assertThat(third.finish(0)).isZero();
                drain.assertLeftAfter(third);
            }
            assertThat(drain.checks().subList(0, drain.busyUntil())).doesNotContain(false);
            assertThat(drain.hook.messages("info")).anyMatch(line -> line.matches(".* \\d+ connections? to port "
                    + address.port() + " from 127\\.0\\.0\\.1:\\d+.* and [1-9]\\d* to " + drain.socket() + "\\..*"));
        }
    }

    @Test
    void leavesAfterTheQuietTimeWhenThereIsNoBuild() {
        try (Dockerd.Address address = newest().takeAddress(); Drain drain = Drain.start(address)) {
            assertThat(drain.hook.exitCode()).isZero();
            assertThat(drain.checks()).hasSizeBetween(CHECKS_NEEDED, CHECKS_NEEDED + 3).containsOnly(false);
            assertThat(drain.hook.messages("info")).noneMatch(line -> line.contains(" from "));
            assertThat(drain.hook.messages("warning")).isEmpty();
        }
    }

    // ---- The hook --------------------------------------------------------------------------------------------------

    /** When the process ended, as System.nanoTime(). */
    private static CompletableFuture<Long> endOf(Hook process) {
        return process.process().onExit().thenApply(ended -> System.nanoTime());
    }

    /** A run of the hook. */
    private record Drain(Hook hook, CompletableFuture<Long> end, Dockerd.Address address, int quietSeconds)
            implements AutoCloseable {

        static Drain start(Dockerd.Address address) {
            return start(address, QUIET_SECONDS, Hook.javaCommand());
        }

        static Drain start(Dockerd.Address address, int quietSeconds, List<String> java, String... args) {
            Hook hook = Hook.run(Stream.concat(java.stream(), Stream.of(args)).toList(), Hook.env("DEBUG", "1",
                    "BUILDKITD_PORT", address.port(), "BUILDKITD_SOCKET", address.socket().getFileName(),
                    "CHECK_FREQUENCY_MS", quietSeconds * 1000 / CHECKS_NEEDED,
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", quietSeconds));
            return new Drain(hook, endOf(hook), address, quietSeconds);
        }

        String socket() {
            return address.socket().getFileName().toString();
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
            return hook.checks().stream().map(check -> !check.equals("0")).toList();
        }

        /** How many checks there were until the last one that saw connections. */
        int busyUntil() {
            return checks().lastIndexOf(true) + 1;
        }

        /** For a build that has just ended: asserts that the hook stayed until then, and left after the quiet time. */
        void assertLeftAfter(Build build) {
            assertThat(hook.exitCode()).isZero();
            // A second is more than the client needs to end when it has closed its connections.
            assertThat(Duration.ofNanos(end.join() - build.end.join())).as("from the client's end to the hook's")
                    .isGreaterThan(Duration.ofSeconds(quietSeconds - 1));
            // The latest moment to leave is told in checks. How long they take says more about the other tests.
            assertThat(checks().size() - busyUntil()).as("quiet checks after the build")
                    .isBetween(CHECKS_NEEDED, CHECKS_NEEDED + 3); // more, if the quiet time was not over
            String seen = build.over == Over.TCP
                    ? ".* \\d+ connections? to port " + address.port() + " from 127\\.0\\.0\\.1:\\d+.*"
                    : ".* 0 connections to port " + address.port() + " and [1-9]\\d* to " + socket() + "\\..*";
            assertThat(hook.messages("info")).anyMatch(line -> line.matches(seen))
                    .endsWith("[PreStop Hook] All build processes seem to have stopped. Exiting now.");
            // A machine may be so busy that a tool has no answer in time, which only makes the hook stay.
            assertThat(hook.messages("warning")).allMatch(line -> line.contains("no answer in"));
            assertThat(build.imageExists()).isEqualTo(build.client.exitCode() == 0);
        }

        @Override
        public void close() {
            hook.close();
        }
    }

    // ---- The client ------------------------------------------------------------------------------------------------

    /** A client that builds. */
    private static final class Build implements AutoCloseable {
        private static final AtomicInteger COUNTER = new AtomicInteger();

        private final String image = "build-" + COUNTER.incrementAndGet();
        private final Dockerd.Address address;
        private final Over over;
        private final Dockerd.Gate gate = new Dockerd.Gate();
        private final Hook client;
        private final CompletableFuture<Long> end;

        /** A build that runs until the test lets it go. */
        static Build start(Dockerd.Address address, Over over) {
            return new Build(address, over, false);
        }

        /** Or a bake of two targets, of which the second needs the first. Each runs for five seconds. */
        Build(Dockerd.Address address, Over over, boolean bake) {
            this.address = address;
            this.over = over;
            // The arguments are part of a step's environment, so none finds another's result in the cache.
            client = bake
                    ? docker("buildx", "bake", "--progress=plain", "--file=" + context.resolve("bake.hcl"),
                            "--set=*.context=" + context, "--set=second.tags=" + image, "first", "second")
                    : docker(address.dockerd().docker.hasBuildx ? "buildx" : "image", "build", "--progress=plain",
                            "--network=host", "--tag=" + image, "--build-arg=IMAGE=" + image, gate.argument(),
                            context.toString());
            end = endOf(client);
            try {
                if (bake) {
                    client.awaitLog("] RUN ");
                } else {
                    gate.awaitStep(client);
                }
            } catch (AssertionError e) {
                close();
                throw e;
            }
        }

        private Hook docker(String... arguments) {
            return address.dockerd().docker.run(over == Over.TCP ? address.tcp() : address.unix(), arguments);
        }

        /** Lets the step end with the exit code, a digit, and returns that of the client. */
        int finish(int exitCode) {
            gate.open(exitCode);
            return client.exitCode();
        }

        /** Signals the client, and the plugin that does the work in newer ones, as Ctrl-C does. */
        int signal(String name) {
            Stream.concat(client.process().descendants(), Stream.of(client.process().toHandle())).toList()
                    .forEach(process -> Hook.run(List.of("sh", "-c", "kill -" + name + " " + process.pid()), Map.of()));
            return client.exitCode();
        }

        boolean imageExists() {
            return docker("inspect", image).exitCode() == 0;
        }

        @Override
        public void close() {
            client.close();
            gate.close();
        }
    }
}
