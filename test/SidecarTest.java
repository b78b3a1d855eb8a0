import static org.assertj.core.api.Assertions.assertThat;

import io.fabric8.kubernetes.api.model.Container;
import io.fabric8.kubernetes.api.model.EnvVar;
import io.fabric8.kubernetes.api.model.PodSpec;
import io.fabric8.kubernetes.api.model.Probe;
import java.io.IOException;
import java.net.ServerSocket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.api.parallel.Execution;
import org.junit.jupiter.api.parallel.ExecutionMode;

/**
 * The README's pod with a sidecar: its own commands, run in two containers that share the network and one directory,
 * but neither processes nor files. BuildKit is Debian's dockerd, and the test is the kubelet.
 */
@Timeout(180)
@Execution(ExecutionMode.SAME_THREAD)
class SidecarTest {

    /**
     * Makes the first argument the root of a container: everything the machine has, but its own /tmp, /prestop, /proc
     * and script. Then runs the rest as process 1 there.
     */
    private static final String CONTAINER = """
            set -e
            root=$1 tmp=$2 shared=$3 repository=$4
            shift 4
            mount -t tmpfs -o mode=0755 tmpfs "$root"
            mkdir "$root/tmp" "$root/prestop" "$root/proc" "$root/repository" "$root/opt"
            for entry in /* /opt/*; do
                if [ -L "$entry" ]; then
                    cp -P "$entry" "$root$entry"
                elif [ -d "$entry" ] && ! [ -e "$root$entry" ]; then
                    mkdir "$root$entry"
                    mount --rbind "$entry" "$root$entry"
                fi
            done
            mkdir "$root/opt/prestop"
            cp "$repository/buildkit-prestop.java" "$root/opt/prestop/"
            mount --bind "$tmp" "$root/tmp"
            mount --bind "$shared" "$root/prestop"
            mount --bind "$repository" "$root/repository"
            mount -t proc proc "$root/proc"
            exec chroot "$root" "$@"
            """;
    private static final String DOCKERFILE = """
            FROM scratch
            COPY busybox /busybox
            RUN ["/busybox", "sh", "-c", "echo building; /busybox sleep 12; echo built >/result"]
            """;

    @TempDir
    Path temp;

    private final List<Hook> started = new ArrayList<>();
    private final PodSpec pod = DocsTest.blocks("yaml").stream().flatMap(block -> DocsTest.pods(block).stream())
            .filter(spec -> !spec.getInitContainers().isEmpty()).findFirst().orElseThrow();
    private final Container buildkitd = pod.getContainers().get(0);
    private final Container sidecar = pod.getInitContainers().get(0);
    private String client;
    private int port;
    private Path shared;

    @BeforeEach
    void preparePod() throws IOException {
        Tools.requireRoot();
        Stream.of("dockerd", "docker", "busybox", "unshare", "nsenter", "setpriv").forEach(Tools::require);
        client = findClient();
        try (ServerSocket free = new ServerSocket(0)) {
            port = free.getLocalPort();
        }
        shared = Files.createDirectory(temp.resolve("shared"));
        Files.setPosixFilePermissions(shared, PosixFilePermissions.fromString("rwxrwxrwx")); // as an emptyDir
        Path context = Files.createDirectory(temp.resolve("context"));
        Files.copy(Tools.require("busybox").toRealPath(), context.resolve("busybox"));
        Files.writeString(context.resolve("Dockerfile"), DOCKERFILE);
    }

    @AfterEach
    void endPod() {
        for (int i = started.size() - 1; i >= 0; i--) {
            started.get(i).close();
        }
    }

    @Test
    void buildkitdGetsItsSigtermOnlyWhenTheImageIsComplete() {
        Hook prestop = startSidecar();
        Hook daemon = startBuildkitd();
        Hook build = build("image");

        List<Hook> hooks = preStopHooks(prestop, daemon);
        Hook.waitUntil("new builds go elsewhere", () -> !ready(daemon));
        prestop.awaitLog(" to port " + port + " from ");
        Hook.waitUntil("the build ends", () -> !build.process().isAlive() || ended(hooks));
        assertThat(ended(hooks)).as("buildkitd would be stopped with the build running").isFalse();
        assertThat(build.exitCode()).as(String.join("\n", build.err())).isZero();

        long built = System.nanoTime();
        hooks.forEach(hook -> assertThat(hook.exitCode()).isZero());
        assertThat(Duration.ofNanos(System.nanoTime() - built)).isLessThan(Duration.ofSeconds(10));
        assertThat(docker("image", "inspect", "image").exitCode()).isZero();
        assertThat(prestop.err()).anyMatch(line -> line.contains("All build processes seem to have stopped."));
        assertThat(shared).isEmptyDirectory();

        terminate(daemon);
        terminate(prestop); // a native sidecar's turn comes when the other containers have ended
    }

    @Test
    void hookIsAskedAgainAfterALivenessRestartAndWhateverWasLeftInTheSharedDirectory() throws IOException {
        Path stale = Files.createFile(shared.resolve("ask.stale0"));
        Hook prestop = startSidecar();
        Hook daemon = startBuildkitd();
        Hook.waitUntil("the stale file goes", () -> Files.notExists(stale));
        for (Hook first : preStopHooks(prestop, daemon)) {
            assertThat(first.exitCode()).isZero();
        }
        Hook build = build("image");
        List<Hook> second = preStopHooks(prestop, daemon);
        Hook.waitUntil("the build ends", () -> !build.process().isAlive() || ended(second));
        assertThat(ended(second)).isFalse();
        assertThat(build.exitCode()).isZero();
        second.forEach(hook -> assertThat(hook.exitCode()).isZero());
    }

    @Test
    void buildkitdWaitsForASidecarThatDiedUntilItIsThereAgain() {
        Hook prestop = startSidecar();
        Hook daemon = startBuildkitd();
        Hook build = build("image");
        List<Hook> hooks = preStopHooks(prestop, daemon);
        prestop.awaitLog(" to port " + port + " from ");
        prestop.close();
        assertThat(build.exitCode()).isZero();
        Hook.pause(3000); // the quiet time is 1 s
        assertThat(ended(hooks)).isFalse();
        startSidecar();
        hooks.forEach(hook -> assertThat(hook.exitCode()).isZero());
    }

    // ---- The kubelet -----------------------------------------------------------------------------------------------

    /**
     * What JBang and its helper would fetch: JBang itself, which a real sidecar has in its image, and picocli. So the
     * test needs no network.
     */
    private static void fill(Path jbangDirectory) throws IOException {
        List<String> java = Hook.javaCommand();
        Path picocli = Stream.of(java.get(java.size() - 2).split(":")).map(Path::of)
                .filter(jar -> jar.getFileName().toString().startsWith("picocli-")).findFirst().orElseThrow();
        List<Path> copies = new ArrayList<>();
        try (Stream<Path> jars = Files.list(Tools.JBANG_DIR)) {
            jars.filter(jar -> jar.getFileName().toString().startsWith("jbang-cli-")).forEach(copies::add);
        }
        Path repository = jbangDirectory.resolve("repository/info/picocli/picocli")
                .resolve(picocli.getParent().getFileName());
        Files.createDirectories(repository);
        for (Path jar : copies) {
            Files.copy(jar, jbangDirectory.resolve(jar.getFileName()));
        }
        try (Stream<Path> files = Files.list(picocli.getParent())) {
            for (Path file : (Iterable<Path>) files::iterator) {
                Files.copy(file, repository.resolve(file.getFileName()));
            }
        }
        try (Stream<Path> all = Files.walk(jbangDirectory)) {
            for (Path directory : (Iterable<Path>) all.filter(Files::isDirectory)::iterator) {
                Files.setPosixFilePermissions(directory, PosixFilePermissions.fromString("rwxrwxrwx"));
            }
        }
    }

    /** The sidecar, started: its startup probe has passed. */
    private Hook startSidecar() {
        Map<String, String> env = Hook.env("HOME", "/tmp", "PATH", "/repository/test:" + System.getenv("PATH"),
                "BUILDKITD_PORT", port, "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 1,
                "KUBERNETES_SERVICE_HOST", "10.0.0.1");
        sidecar.getEnv().forEach((EnvVar variable) -> env.put(variable.getName(), variable.getValue()));
        long uid = sidecar.getSecurityContext().getRunAsUser();
        List<String> command = new ArrayList<>(List.of("setpriv", "--reuid=" + uid, "--regid=" + uid,
                "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"));
        command.addAll(sidecar.getCommand());
        Hook container = container(env, command);
        Probe probe = sidecar.getStartupProbe();
        Duration limit = Duration.ofSeconds((long) probe.getPeriodSeconds() * probe.getFailureThreshold());
        while (exec(container, probe.getExec().getCommand()).exitCode() != 0) {
            assertThat(container.process().isAlive()).as(String.join("\n", container.err())).isTrue();
            assertThat(container.age()).as(String.join("\n", container.err())).isLessThan(limit);
            Hook.pause(100);
        }
        assertThat(container.out()).containsExactly("buildkit-prestop 1.0.0");
        return container;
    }

    private Hook startBuildkitd() {
        Hook container = container(Map.of("HOME", "/tmp"), List.of("sh", "-c",
                "echo '{}' >/tmp/daemon.json; exec dockerd --config-file=/tmp/daemon.json --storage-driver=vfs"
                        + " --data-root=/tmp/data --exec-root=/tmp/exec --pidfile=/tmp/pid --bridge=none"
                        + " --iptables=false --ip6tables=false --host=tcp://127.0.0.1:" + port));
        Hook.waitUntil("BuildKit listens", () -> {
            assertThat(container.process().isAlive()).as(String.join("\n", container.err())).isTrue();
            return docker("version").exitCode() == 0;
        });
        return container;
    }

    private Hook container(Map<String, String> env, List<String> command) {
        try {
            Path root = Files.createTempDirectory(temp, "root");
            Path tmp = Files.createTempDirectory(temp, "tmp");
            Files.setPosixFilePermissions(tmp, PosixFilePermissions.fromString("rwxrwxrwx"));
            fill(tmp.resolve("jbang"));
            List<String> unshare = new ArrayList<>(List.of("unshare", "--mount", "--pid", "--fork", "--kill-child",
                    "sh", "-c", CONTAINER, "container", root.toString(), tmp.toString(), shared.toString(),
                    Hook.REPOSITORY.toString()));
            unshare.addAll(command);
            Hook container = Hook.run(unshare, env);
            started.add(container);
            return container;
        } catch (IOException e) {
            throw new AssertionError(e);
        }
    }

    /** Runs a command in a container, as kubectl exec and the kubelet do. */
    private static Hook exec(Hook container, List<String> command) {
        List<String> nsenter = new ArrayList<>(List.of("nsenter", "--target=" + firstProcess(container).pid(),
                "--mount", "--pid", "--root", "--wd=/"));
        nsenter.addAll(command);
        return Hook.run(nsenter, Map.of());
    }

    private static ProcessHandle firstProcess(Hook container) {
        Hook.waitUntil("unshare forks", () -> container.process().children().findAny().isPresent());
        return container.process().children().findAny().orElseThrow();
    }

    /** Starts the preStop hooks of all containers that have one, at the same time. */
    private List<Hook> preStopHooks(Hook prestop, Hook daemon) {
        Map<Container, Hook> containers = new HashMap<>(Map.of(sidecar, prestop, buildkitd, daemon));
        containers.keySet().removeIf(container -> container.getLifecycle() == null);
        List<Hook> hooks = containers.entrySet().stream().map(entry -> exec(entry.getValue(),
                entry.getKey().getLifecycle().getPreStop().getExec().getCommand())).toList();
        started.addAll(hooks);
        assertThat(hooks).isNotEmpty();
        return hooks;
    }

    private static boolean ended(List<Hook> hooks) {
        return hooks.stream().anyMatch(hook -> !hook.process().isAlive());
    }

    /** Whether buildkitd's readiness probe passes; dockerd has no buildctl, so that is answered for it. */
    private boolean ready(Hook daemon) {
        List<String> probe = buildkitd.getReadinessProbe().getExec().getCommand().stream()
                .map(word -> word.replace("buildctl debug workers", "true")).toList();
        return exec(daemon, probe).exitCode() == 0;
    }

    private static void terminate(Hook container) {
        firstProcess(container).destroy();
        Hook.waitUntil("SIGTERM ends the container", () -> !container.process().isAlive());
    }

    // ---- The client ------------------------------------------------------------------------------------------------

    /** A build that takes some seconds, running. */
    private Hook build(String image) {
        Hook build = docker("build", "--network=host", "--no-cache", "--tag=" + image,
                temp.resolve("context").toString());
        started.add(build);
        Hook.waitUntil("the build runs", () -> {
            assertThat(build.process().isAlive()).as(build.out() + "\n" + build.err()).isTrue();
            return Stream.concat(build.out().stream(), build.err().stream())
                    .anyMatch(line -> line.endsWith("building"));
        });
        return build;
    }

    private Hook docker(String... arguments) {
        List<String> command = new ArrayList<>(List.of(client));
        command.addAll(List.of(arguments));
        return Hook.run(command, Hook.env("DOCKER_HOST", "tcp://127.0.0.1:" + port, "HOME", temp,
                "DOCKER_BUILDKIT", 1, "BUILDKIT_PROGRESS", "plain"));
    }

    /** The first docker on the PATH that can build with BuildKit: from version 23 on it needs a plugin for that. */
    private static String findClient() {
        for (String directory : (System.getenv("PATH") + ":/usr/bin").split(":")) {
            String docker = directory + "/docker";
            if (Files.isExecutable(Path.of(docker))) {
                try (Hook version = Hook.run(List.of(docker, "--version"), Map.of());
                        Hook plugin = Hook.run(List.of(docker, "buildx", "version"), Map.of())) {
                    boolean old = version.exitCode() == 0
                            && version.out().get(0).matches("Docker version (1\\d|20|21|22)\\..*");
                    if (old || plugin.exitCode() == 0) {
                        return docker;
                    }
                }
            }
        }
        return Assumptions.abort("needs a docker that can build with BuildKit (docker-buildx, from version 23 on)");
    }
}
