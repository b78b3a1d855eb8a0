import static org.assertj.core.api.Assertions.assertThat;

import io.fabric8.kubernetes.api.model.*;
import java.io.IOException;
import java.net.ServerSocket;
import java.nio.file.*;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.api.parallel.*;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/**
 * The README's pod with a sidecar: its own commands, run in two containers that share the network and one directory,
 * but neither processes nor files. BuildKit is that of dockerd, and the test is the kubelet.
 */
@Execution(ExecutionMode.SAME_THREAD)
class SidecarTest {

    /**
     * Makes the root of a container: everything the machine has, but its own /tmp, /prestop, /proc and /opt/prestop,
     * where the script is, and of netstat and ss only the one that is named. Then runs the rest of the arguments as
     * process 1 there.
     */
    private static final String CONTAINER = """
            set -e
            shared=$1 repository=$2 kept=$3
            shift 3
            root=$(mktemp -d -p "$shared/..")
            mount -t tmpfs -o mode=0755 tmpfs "$root"
            mkdir -p "$root/prestop" "$root/proc" "$root/opt/prestop"
            mkdir -m 1777 "$root/tmp"
            for entry in /* /opt/*; do
                if [ -L "$entry" ]; then
                    cp -P "$entry" "$root$entry"
                elif [ -d "$entry" ] && ! [ -e "$root$entry" ]; then
                    mkdir "$root$entry"
                    mount --rbind "$entry" "$root$entry"
                fi
            done
            mount --bind "$shared" "$root/prestop"
            mount --bind "$repository" "$root/opt/prestop"
            mount -t proc proc "$root/proc"
            for tool in netstat ss; do
                for file in "$root"/usr/sbin/$tool "$root"/usr/bin/$tool "$root"/bin/$tool "$root"/sbin/$tool; do
                    if [ "$tool" != "$kept" ] && [ -e "$file" ]; then mount --bind /dev/null "$file"; fi
                done
            done
            exec chroot "$root" "$@"
            """;

    @TempDir
    Path temp;

    private final List<Hook> started = new ArrayList<>();
    private final Dockerd.Gate gate = new Dockerd.Gate();
    private final PodSpec pod = DocsTest.podOf(DocsTest.saved("prestop.yaml"));
    private final Container buildkitd = pod.getContainers().get(0);
    private final Container sidecar = pod.getInitContainers().get(0);
    private final Probe probe = sidecar.getStartupProbe();
    private Dockerd.Docker docker;
    private int port;
    private String host;
    private Path shared;

    @BeforeEach
    void preparePod(TestInfo test) throws IOException {
        Tools.requireRoot();
        Stream.of("busybox", "nsenter", "netstat", "ss").forEach(Tools::require);
        List<Dockerd.Docker> dockers = Dockerd.Docker.installed(temp);
        docker = dockers.get(dockers.size() - 1);
        try (ServerSocket free = new ServerSocket(0)) {
            port = free.getLocalPort();
        }
        shared = Files.createDirectory(temp.resolve("shared"));
        // JBang is in a real sidecar's image, and picocli is fetched before its startup probe passes.
        Tools.copyFetched(shared.resolve("jbang"), shared.resolve("jbang/repository"));
        boolean compiles = test.getDisplayName().startsWith("idle");
        if (!compiles) { Tools.copyCompiled(shared.resolve("jbang")); }
        assertThat(Hook.run(List.of("chmod", "-R", "a+rwX", shared.toString()), Map.of()).exitCode()).isZero();
        Path context = Files.createDirectory(temp.resolve("context"));
        Files.copy(Tools.require("busybox").toRealPath(), context.resolve("busybox"));
        Files.writeString(context.resolve("Dockerfile"), Dockerd.Gate.DOCKERFILE);
    }

    @AfterEach
    void endPod() {
        started.forEach(Hook::close);
        gate.close();
    }

    @ParameterizedTest
    @CsvSource({"false, netstat", "true, none"})
    void buildkitdGetsItsSigtermOnlyWhenTheImageIsComplete(boolean overTheUnixSocket, String tool) {
        Hook prestop = startSidecar(tool);
        Hook daemon = startBuildkitd();
        if (overTheUnixSocket) {
            host = "unix:///proc/" + firstProcess(daemon).pid() + "/root/tmp/" + socket();
        }
        Hook build = build();
        Hook hook = preStop(daemon);
        awaitSeen(prestop);
        assertThat(isReady(prestop)).as("a readiness probe with this command turns new builds away").isFalse();
        Hook.pause(5000); // a hook that sees the connection and does not care would leave after 1 s
        gate.open(0);
        Hook.waitUntil("the build ends", () -> !build.process().isAlive() || !hook.process().isAlive());
        assertThat(hook.process().isAlive()).as("buildkitd would be stopped with the build running").isTrue();
        assertThat(build.exitCode()).as(String.join("\n", build.err())).isZero();

        assertThat(hook.exitCode()).isZero();
        assertThat(docker.run(host, "image", "inspect", "image").exitCode()).isZero();
        Hook.waitUntil("the sidecar serves again", () -> isReady(prestop));
        for (Hook container : List.of(daemon, prestop)) { // a native sidecar's turn comes when the others have ended
            firstProcess(container).destroy();
            Hook.waitUntil("SIGTERM ends the container", () -> !container.process().isAlive());
        }
    }

    @Test
    void waitGoesOnWithASidecarThatIsStartedAgainAndWithoutOneUntilBuildkitdIsEndedByHand() {
        Hook prestop = startSidecar("netstat");
        Hook daemon = startBuildkitd();
        Hook build = build();
        Hook hook = preStop(daemon);
        awaitSeen(prestop);
        prestop.close(); // its only process is the JVM
        Hook restarted = runSidecar("netstat"); // perhaps the probe never passes, because the hook comes first
        awaitSeen(restarted);
        restarted.close(); // that of a pod that ends is not started again
        gate.open(0);
        assertThat(build.exitCode()).isZero();
        Hook.pause(3000); // three times the quiet time, and three tries of the hook
        assertThat(hook.process().isAlive()).isTrue();
        assertThat(DocsTest.README).contains("-- sh -c 'kill 1'");
        exec(daemon, List.of("sh", "-c", "kill 1"));
        Hook.waitUntil("buildkitd ends", () -> !daemon.process().isAlive());
    }

    @Test
    void idleSidecarRestartsWithoutTheNetwork() {
        startSidecar("netstat").close();
        Hook restarted = startSidecar("netstat", "--net");
        preStop(restarted); // the pipe of the first is still there, so that alone would prove nothing
        restarted.awaitLog("Waiting for build processes to finish...");
    }

    // ---- The kubelet -----------------------------------------------------------------------------------------------

    /** The sidecar, started: its startup probe has passed. */
    private Hook startSidecar(String tool, String... namespaces) {
        Hook container = runSidecar(tool, namespaces);
        Hook.waitUntil("the startup probe passes", () -> {
            assertThat(container.process().isAlive()).as(String.join("\n", container.err())).isTrue();
            return isReady(container);
        });
        return container;
    }

    private Hook runSidecar(String tool, String... namespaces) {
        // A user whom the image does not know has / for a home, where it may not write.
        Map<String, String> env = Hook.env("HOME", "/", "PATH", "/opt/prestop/test:" + System.getenv("PATH"),
                "WAIT_UNTIL_NO_BUILDS_SEEN_FOR_X_SECONDS", 1, "KUBERNETES_SERVICE_HOST", "10.0.0.1",
                "BUILDKITD_PORT", port, "BUILDKITD_SOCKET", socket());
        // The quiet time above, which is short, wins over the patch's.
        sidecar.getEnv().forEach(variable -> env.putIfAbsent(variable.getName(), variable.getValue()));
        long uid = sidecar.getSecurityContext().getRunAsUser();
        List<String> command = new ArrayList<>(List.of("setpriv", "--reuid=" + uid, "--regid=0",
                "--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"));
        command.addAll(sidecar.getCommand());
        return container(tool, env, command, namespaces);
    }

    /** Whether its startup probe passes. */
    private boolean isReady(Hook prestop) {
        return exec(prestop, probe.getExec().getCommand()).exitCode() == 0;
    }

    private Hook startBuildkitd() {
        host = "tcp://127.0.0.1:" + port;
        Hook container = container("netstat", docker.environment,
                docker.daemonCommand(Path.of("/tmp"), host, "unix:///tmp/" + socket()));
        Hook.waitUntil("BuildKit listens", () -> {
            assertThat(container.process().isAlive()).as(String.join("\n", container.err())).isTrue();
            return docker.run(host, "version").exitCode() == 0;
        });
        return container;
    }

    /** A name of its own: the kernel shows the sockets of other tests too. */
    private String socket() { return "buildkitd-" + port + ".sock"; }

    private Hook container(String tool, Map<String, String> env, List<String> command, String... namespaces) {
        List<String> unshare = new ArrayList<>(List.of("unshare", "--mount", "--pid", "--fork", "--kill-child"));
        unshare.addAll(List.of(namespaces));
        unshare.addAll(List.of("sh", "-c", CONTAINER, "container", shared.toString(), Hook.REPOSITORY.toString(),
                tool));
        unshare.addAll(command);
        return keep(Hook.run(unshare, env));
    }

    private Hook keep(Hook hook) {
        started.add(hook);
        return hook;
    }

    /** Runs a command in a container, as kubectl exec and the kubelet do. */
    private static Hook exec(Hook container, List<String> command) {
        Stream<String> nsenter = Stream.of("nsenter", "--target=" + firstProcess(container).pid(),
                "--mount", "--pid", "--root", "--wd=/");
        return Hook.run(Stream.concat(nsenter, command.stream()).toList(), Map.of());
    }

    private static ProcessHandle firstProcess(Hook container) {
        Hook.waitUntil("unshare forks", () -> container.process().children().findAny().isPresent());
        return container.process().children().findAny().orElseThrow();
    }

    /** Starts buildkitd's preStop hook; the sidecar must have none. */
    private Hook preStop(Hook daemon) {
        assertThat(sidecar.getLifecycle()).isNull();
        return keep(exec(daemon, buildkitd.getLifecycle().getPreStop().getExec().getCommand()));
    }

    // ---- The client ------------------------------------------------------------------------------------------------

    /** A build that runs until the gate opens. */
    private Hook build() {
        Hook build = keep(docker.run(host, "build", "--network=host", "--tag=image", gate.argument(),
                temp.resolve("context").toString()));
        gate.awaitStep(build);
        return build;
    }

    /** Waits until the sidecar sees it, over TCP or over the unix socket. */
    private void awaitSeen(Hook prestop) {
        String connections = ".* connections? to (port " + port + " from|" + socket() + ").*";
        Hook.waitUntil("the build is seen", () -> prestop.err().stream().anyMatch(line -> line.matches(connections)));
    }
}
