import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

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
    /** So many checks lie around the quiet time. */
    private static final int CHECKS_NEEDED = 11;

    @TempDir
    private static Path directory;
    private static Path context;
    private static final List<Dockerd> dockerds = new ArrayList<>();

    @BeforeAll
    static void startDockerds() throws IOException {
        Tools.requireRoot();
        directory = directory.toRealPath();
        context = Files.createDirectory(directory.resolve("context"));
        Files.copy(Tools.require("busybox"), context.resolve("busybox"));
        assumeTrue(Hook.run(List.of("chroot", context.toString(), "/busybox", "true"), Map.of()).exitCode() == 0,
                "needs a busybox that is linked statically (package busybox-static)");
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
    }

    @AfterAll
    static void stopDockerds() { dockerds.forEach(Dockerd::close); }

    /** What a client connects to. */
    enum Over { TCP, SOCKET }

    /** A docker that builds over one of the two. */
    record Way(Dockerd dockerd, Over over) {
        @Override
        public String toString() { return dockerd.docker.versions + " over " + over; }
    }

    /** The oldest over the one and the newest over the other; perhaps they are the same. */
    static Stream<Way> ways() { return Stream.of(new Way(dockerds.get(0), Over.TCP), new Way(newest(), Over.SOCKET)); }

    private static Dockerd newest() { return dockerds.get(dockerds.size() - 1); }

    // ---- The tests -------------------------------------------------------------------------------------------------

    @ParameterizedTest
    @MethodSource("ways")
    void staysWhileABuildSendsNothingForFifteenSeconds(Way way) {
        try (Dockerd.Address address = way.dockerd.takeAddress(); Build build = Build.start(address, way.over);
                Drain drain = Drain.start(address)) {
            Hook.pause(15_000);
            drain.awaitBusyChecks(1);
            build.gate.open(0);
            drain.assertLeftAfter(build, true);
        }
    }

    /** How a build may end but for well: it fails, or its client gets SIGINT or SIGKILL. */
    enum End { ERROR, INT, KILL }

    @ParameterizedTest
    @EnumSource
    void leavesAfterABuildThatCameToABadEnd(End end) {
        try (Dockerd.Address address = newest().takeAddress(); Build build = Build.start(address, Over.TCP);
                Drain drain = Drain.start(address)) {
            drain.awaitBusyChecks(CHECKS_NEEDED + 5); // without the build it would have left
            if (end == End.ERROR) {
                build.gate.open(1);
            } else {
                build.signal(end.name());
            }
            drain.assertLeftAfter(build, false);
            build.gate.awaitStepStopped(); // as BuildKit does with a build whose client has gone
        }
    }

    @ParameterizedTest
    @EnumSource
    void staysUntilTheSecondTargetOfABakeIsBuilt(Over over) {
        assumeTrue(newest().docker.hasBuildx, "needs docker 23 or newer with buildx, on the PATH or in MODERN_DOCKER");
        try (Dockerd.Address address = newest().takeAddress(); Build first = Build.start(address, over);
                Drain drain = Drain.start(address); Build bake = new Build(address, over, true)) {
            drain.awaitBusyChecks(1); // however long it takes to start
            first.finish();
            drain.assertLeftAfter(bake, true);
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"netstat", "ss", "none"})
    void staysUntilTheLastBuildHasEndedWhateverToolIsInstalled(String tool) {
        Path tools = directory.resolve("with " + tool);
        Tools.only(tools, tool.equals("none") ? Map.of() : Map.of(tool, Tools.require(tool)));
        try (Dockerd.Address address = newest().takeAddress(); Build first = Build.start(address, Over.TCP);
                Build second = Build.start(address, Over.SOCKET);
                Drain drain = Drain.start(address, tools.toString())) {
            drain.awaitBusyChecks(1);
            first.finish();
            drain.awaitBusyChecks(CHECKS_NEEDED + 5); // without the one over the socket it would have left
            try (Build third = Build.start(address, Over.TCP)) {
                second.finish();
                drain.awaitBusyChecks(CHECKS_NEEDED + 5); // without the one over TCP it would have left
                third.gate.open(0);
                drain.assertLeftAfter(third, true);
            }
            assertThat(drain.hook.messages("info")).anyMatch(line -> line.matches(".* \\d+ connections? to port "
                    + address.port() + " from 127\\.0\\.0\\.1:\\d+.* and [1-9]\\d* to " + drain.socket() + "\\..*"));
        }
    }

    // ---- The hook --------------------------------------------------------------------------------------------------

    /** A run of the hook, started while a build runs. */
    private record Drain(Hook hook, Dockerd.Address address) implements AutoCloseable {

        static Drain start(Dockerd.Address address) { return start(address, System.getenv("PATH")); }

        static Drain start(Dockerd.Address address, String path) {
            return new Drain(Hook.start(Hook.env("DEBUG", "1", "PATH", path, "BUILDKITD_PORT", address.port(),
                    "BUILDKITD_SOCKET", address.socket().getFileName(),
                    "CHECK_FREQUENCY_MS", QUIET_SECONDS * 1000 / (CHECKS_NEEDED - 1),
                    "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", QUIET_SECONDS)), address);
        }

        String socket() { return address.socket().getFileName().toString(); }

        /** Waits for so many more checks that see connections. */
        void awaitBusyChecks(int number) {
            long before = checks().stream().filter(busy -> busy).count();
            Hook.waitUntil(number + " busy checks", () -> !hook.process().isAlive()
                    || checks().stream().filter(busy -> busy).count() >= before + number);
            assertThat(hook.process().isAlive()).as("the hook still waits. It said: " + hook.err()).isTrue();
        }

        /** Whether it saw connections, for each check. */
        List<Boolean> checks() { return hook.checks().stream().map(check -> !check.equals("0")).toList(); }

        /** For the last build, which ends now: the hook stays until then, and leaves after the quiet time. */
        void assertLeftAfter(Build build, boolean well) {
            assertThat(hook.exitCode()).isZero();
            assertThat(build.imageExists()).as("the image is complete when the hook has ended").isEqualTo(well);
            assertThat(build.client.exitCode() == 0).as("the client is content").isEqualTo(well);
            // The moments to leave are told in checks. How long they take says more about the other tests.
            List<Boolean> checks = checks();
            int busyUntil = checks.lastIndexOf(true) + 1;
            if (well) {
                assertThat(checks.subList(0, busyUntil)).doesNotContain(false);
            }
            assertThat(checks.size() - busyUntil).as("quiet checks after the build")
                    .isBetween(hook.saidItsLast() ? CHECKS_NEEDED : 0, CHECKS_NEEDED);
            String seen = build.over == Over.TCP
                    ? ".* \\d+ connections? to port " + address.port() + " from 127\\.0\\.0\\.1:\\d+.*"
                    : ".* \\d+ connections? to (port " + address.port() + " .* to )?" + socket() + "\\..*";
            assertThat(hook.messages("info")).anyMatch(line -> line.matches(seen));
            assertThat(hook.messages("warning")).isEmpty();
        }

        @Override
        public void close() { hook.close(); }
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

        /** A build that runs until the test lets it go. */
        static Build start(Dockerd.Address address, Over over) { return new Build(address, over, false); }

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

        /** Lets it end well, and waits for that. */
        void finish() {
            gate.open(0);
            assertThat(client.exitCode()).isZero();
        }

        /** Signals the client, and the plugin that does the work in newer ones, as Ctrl-C does. */
        void signal(String name) {
            Stream.concat(client.process().descendants(), Stream.of(client.process().toHandle())).toList()
                    .forEach(process -> Hook.run(List.of("sh", "-c", "kill -" + name + " " + process.pid()), Map.of()));
        }

        boolean imageExists() { return docker("inspect", image).exitCode() == 0; }

        @Override
        public void close() {
            client.close();
            gate.close();
        }
    }
}
