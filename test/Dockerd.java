import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;
import static org.junit.jupiter.api.Assumptions.assumeFalse;

import java.io.*;
import java.net.*;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
import java.util.regex.*;
import java.util.stream.Stream;

/** A dockerd with all its state in one directory, and with several addresses, so that each test has one to itself. */
final class Dockerd implements AutoCloseable {

    /** So many tests run at a time. A dockerd takes a second per port to start: it warns that there is no TLS. */
    private static final int ADDRESSES = 4;

    final Docker docker;
    private final Path directory;
    private final Hook process;
    private final BlockingQueue<Address> free = new LinkedBlockingQueue<>();

    /** Starts it; it takes some seconds until it answers. */
    Dockerd(Docker docker, Path directory) {
        this.docker = docker;
        this.directory = directory;
        // Below the ports that the kernel gives to clients, so that no other test's connection takes one.
        ThreadLocalRandom.current().ints(10_000, 32_000).filter(Dockerd::isFree).distinct().limit(ADDRESSES)
                .forEach(port -> free.add(new Address(this, port, directory.resolve("docker-" + port + ".sock"))));
        process = Hook.run(docker.daemonCommand(directory, free.stream()
                .flatMap(address -> Stream.of(address.tcp(), address.unix())).toArray(String[]::new)),
                docker.environment);
        Runtime.getRuntime().addShutdownHook(new Thread(this::stop)); // when the tests are interrupted
    }

    private static boolean isFree(int port) {
        try (ServerSocket socket = new ServerSocket(port, 1, InetAddress.getLoopbackAddress())) {
            return true;
        } catch (IOException e) {
            return false;
        }
    }

    /** Waits until it answers, at most Hook.PATIENCE. */
    void awaitReady() {
        String host = free.element().tcp();
        Hook.waitUntil("dockerd answers", () -> {
            assertThat(process.process().isAlive()).as("dockerd runs. It said: " + process.err()).isTrue();
            return docker.run(host, "version").exitCode() == 0;
        });
    }

    /** Waits for an address that no other test uses. */
    Address takeAddress() { return assertDoesNotThrow(free::take); }

    /** Where one test's clients find the daemon. Its hook sees no other test's builds. Closing it gives it back. */
    record Address(Dockerd dockerd, int port, Path socket) implements AutoCloseable {
        String tcp() { return "tcp://127.0.0.1:" + port; }

        String unix() { return "unix://" + socket; }

        @Override
        public void close() { dockerd.free.add(this); }
    }

    @Override
    public void close() {
        stop();
        // What dockerd could not unmount must not be in the way of deleting the directory, nor be deleted with it.
        Hook unmount = Hook.run(List.of("sh", "-c", "awk -v dir=\"$0/\" 'index($2, dir) == 1 { print $2 }'"
                + " /proc/self/mounts | sort -r | xargs -r umount", directory.toString()), Map.of());
        assertThat(unmount.exitCode()).as(String.join("\n", unmount.err())).isZero();
    }

    /** Ends dockerd, its containerd, and whatever they still run. */
    private void stop() {
        Process daemon = process.process();
        List<ProcessHandle> processes = Stream.concat(daemon.descendants(), Stream.of(daemon.toHandle())).toList();
        daemon.destroy();
        daemon.onExit().completeOnTimeout(daemon, 15, TimeUnit.SECONDS).join();
        processes.forEach(ProcessHandle::destroyForcibly);
        Hook.waitUntil("dockerd's processes end", () -> processes.stream().noneMatch(ProcessHandle::isAlive));
    }

    /** What holds a build until the test lets it go: its only step is connected to the test. */
    static final class Gate implements AutoCloseable {
        /** Needs a static busybox beside it, the argument that argument() gives, and the host's network. */
        static final String DOCKERFILE = """
                FROM scratch
                COPY busybox /bin/busybox
                ARG IMAGE
                ARG GATE
                RUN ["/bin/busybox", "sh", "-c", "exit $(/bin/busybox nc 127.0.0.1 $GATE)"]
                """;
        private final ServerSocket server =
                assertDoesNotThrow(() -> new ServerSocket(0, 1, InetAddress.getLoopbackAddress()));
        private Socket step;

        String argument() { return "--build-arg=GATE=" + server.getLocalPort(); }

        /** Waits until the client's build runs, at most Hook.PATIENCE. */
        void awaitStep(Hook client) {
            step = assertDoesNotThrow(() -> {
                server.setSoTimeout((int) Hook.PATIENCE.toMillis());
                return server.accept();
            }, () -> "the build does not run:\n" + String.join("\n", client.err()));
        }

        /** Lets the step end with the exit code, a digit. */
        void open(int exitCode) {
            assertDoesNotThrow(() -> {
                step.getOutputStream().write('0' + exitCode);
                step.shutdownOutput();
            });
        }

        /** Waits until the step has ended or was ended, at most Hook.PATIENCE. */
        void awaitStepStopped() {
            assertDoesNotThrow(() -> {
                step.setSoTimeout((int) Hook.PATIENCE.toMillis());
                step.getInputStream().readAllBytes();
            }, "the step still runs though its client has gone");
        }

        @Override
        public void close() {
            assertDoesNotThrow(server::close);
            if (step != null) {
                assertDoesNotThrow(step::close);
            }
        }
    }

    /**
     * A docker that is installed and can build with BuildKit: up to version 22 by itself, from 23 on with buildx.
     *
     * There may be two: the one on the PATH, and one in the folder that the environment variable MODERN_DOCKER names,
     * which holds bin/docker, bin/containerd, sbin/dockerd and libexec/docker/cli-plugins/docker-buildx. That is for
     * machines whose own docker is older than 23: there .ci/run unpacks a newer one and sets the variable.
     */
    static final class Docker {
        /** For the client and for the daemon: no settings for Docker but BuildKit. */
        final Map<String, String> environment;
        /** Whether client and daemon are new enough for buildx, and it is there. */
        final boolean hasBuildx;
        /** Of everything in it. */
        final String versions;
        private final boolean canBuild;
        private final String client;
        private final String daemon;

        private Docker(Path client, Path daemon, String path, Path directory) {
            this.client = client.toString();
            this.daemon = daemon.toString();
            Path home = assertDoesNotThrow(() -> Files.createTempDirectory(directory, "docker"));
            environment = Hook.env("PATH", path + ":" + System.getenv("PATH"), "HOME", home, "TMPDIR", home,
                    "DOCKER_CONFIG", home, "DOCKER_BUILDKIT", 1,
                    "BUILDX_BAKE_ENTITLEMENTS_FS", 0); // else bake refuses files outside the working directory
            assertDoesNotThrow(() -> Files.writeString(home.resolve("config.json"), "{\"cliPluginsExtraDirs\": [\""
                    + client.resolveSibling("../libexec/docker/cli-plugins") + "\"]}"));
            String clientVersion = version(this.client, "--version");
            String daemonVersion = version(this.daemon, "--version");
            String buildx = version(this.client, "buildx", "version");
            hasBuildx = !buildx.isEmpty() && !old(clientVersion) && !old(daemonVersion);
            canBuild = hasBuildx || old(clientVersion);
            versions = "docker " + clientVersion + (hasBuildx ? " with buildx " + buildx : "")
                    + (clientVersion.equals(daemonVersion) ? "" : " and dockerd " + daemonVersion);
        }

        /** All there are, the newest last; their settings are kept in the directory. Aborts where there is none. */
        static List<Docker> installed(Path directory) {
            Stream<String> modern = Stream.ofNullable(System.getenv("MODERN_DOCKER"))
                    .map(folder -> folder + "/bin:" + folder + "/sbin");
            List<Docker> found = Stream.concat(Stream.of(System.getenv("PATH")), modern)
                    .flatMap(path -> find(path, directory).stream()).toList();
            assumeFalse(found.isEmpty(),
                    "needs dockerd and a docker that can build with BuildKit (from 23 on: docker-buildx)");
            return found;
        }

        /** The first one on the path that can build. */
        private static Optional<Docker> find(String path, Path directory) {
            return Tools.find("dockerd", path).limit(1).flatMap(daemon -> Tools.find("docker", path)
                    .map(client -> new Docker(client, daemon, path, directory)))
                    .filter(docker -> docker.canBuild).findFirst();
        }

        /** Empty where the command fails. */
        private String version(String... command) {
            Hook run = Hook.run(List.of(command), environment);
            int code = run.exitCode(); // then the output is whole
            Matcher version = Pattern.compile("\\d+\\.[\\w.]+").matcher(String.join("\n", run.out()));
            return code == 0 && version.find() ? version.group() : "";
        }

        private static boolean old(String version) { return version.matches("(1\\d|2[0-2])\\..*"); }

        /** Starts the client, which connects to the host. */
        Hook run(String host, String... arguments) {
            Map<String, String> env = new HashMap<>(environment);
            env.put("DOCKER_HOST", host);
            return Hook.run(Stream.concat(Stream.of(client), Stream.of(arguments)).toList(), env);
        }

        /** What starts the daemon with its state in the directory, and apart from the machine's own Docker. */
        List<String> daemonCommand(Path directory, String... hosts) {
            String name = "buildkit-prestop-" + ProcessHandle.current().pid() + "-" + directory.getFileName();
            String settings = directory.resolve("daemon.json").toString();
            List<String> command = new ArrayList<>(List.of("sh", "-c", "echo '{}' >\"$0\" && exec \"$@\"", settings,
                    daemon, "--config-file=" + settings, "--tls=false",
                    "--data-root=" + directory.resolve("data"), "--exec-root=" + directory.resolve("exec"),
                    "--pidfile=" + directory.resolve("pid"), "--storage-driver=vfs", "--bridge=none",
                    "--iptables=false", "--ip6tables=false", "--containerd-namespace=" + name,
                    "--containerd-plugins-namespace=" + name + "-plugins"));
            Stream.of(hosts).map(host -> "--host=" + host).forEach(command::add);
            return command;
        }
    }
}
