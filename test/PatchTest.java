import static org.assertj.core.api.Assertions.assertThat;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.fabric8.kubernetes.api.model.ConfigMap;
import io.fabric8.kubernetes.api.model.Container;
import io.fabric8.kubernetes.api.model.PodSpec;
import io.fabric8.kubernetes.api.model.PodTemplateSpec;
import io.fabric8.kubernetes.api.model.Volume;
import io.fabric8.kubernetes.api.model.VolumeMount;
import io.fabric8.kubernetes.api.model.apps.Deployment;
import io.fabric8.kubernetes.api.model.apps.StatefulSet;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.attribute.PosixFilePermissions;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.FieldSource;
import org.junit.jupiter.params.provider.ValueSource;

/** Merges the README's patches into manifests as people have them, and runs the shell commands that stand in them. */
class PatchTest {

    private static final String JAR = "/opt/prestop/bin/java -jar /opt/prestop/hook.jar";
    private static final String JBANG = "jbang --offline /opt/prestop/buildkit-prestop.java";

    /** BuildKit's three kinds of examples for Kubernetes, and what buildx's kubernetes driver makes. */
    private static final List<String> SAMPLES = List.of("""
            apiVersion: apps/v1
            kind: Deployment
            metadata: {name: buildkitd}
            spec:
              selector: {matchLabels: {app: buildkitd}}
              template:
                metadata: {labels: {app: buildkitd}}
                spec:
                  containers:
                    - name: buildkitd
                      image: moby/buildkit:master
                      args: [--addr, "unix:///run/buildkit/buildkitd.sock", --addr, "tcp://0.0.0.0:1234",
                        --tlscacert, /certs/ca.pem, --tlscert, /certs/cert.pem, --tlskey, /certs/key.pem]
                      ports: [{containerPort: 1234}]
                      readinessProbe: {tcpSocket: {port: 1234}}
                      securityContext: {privileged: true}
                      volumeMounts: [{name: certs, mountPath: /certs, readOnly: true}]
                  volumes: [{name: certs, secret: {secretName: buildkit-daemon-certs}}]
            """, """
            apiVersion: apps/v1
            kind: Deployment
            metadata: {name: buildkitd}
            spec:
              selector: {matchLabels: {app: buildkitd}}
              template:
                metadata: {labels: {app: buildkitd}, annotations: {team: ci}}
                spec:
                  containers:
                    - name: buildkitd
                      image: moby/buildkit:master-rootless
                      args: [--addr, "unix:///run/user/1000/buildkit/buildkitd.sock", --addr, "tcp://0.0.0.0:1234",
                        --oci-worker-no-process-sandbox]
                      env: [{name: TZ, value: UTC}]
                      livenessProbe: {exec: {command: [buildctl, debug, workers]}, periodSeconds: 30}
                      readinessProbe: {exec: {command: [buildctl, debug, workers]}, periodSeconds: 30}
                      securityContext: {runAsUser: 1000, runAsGroup: 1000, seccompProfile: {type: Unconfined}}
                      volumeMounts: [{name: state, mountPath: /home/user/.local/share/buildkit}]
                  volumes: [{name: state, emptyDir: {}}]
            """, """
            apiVersion: apps/v1
            kind: StatefulSet
            metadata: {name: buildkitd}
            spec:
              serviceName: buildkitd
              podManagementPolicy: Parallel
              selector: {matchLabels: {app: buildkitd}}
              template:
                metadata: {labels: {app: buildkitd}}
                spec:
                  containers:
                    - {name: buildkitd, image: "moby/buildkit:master", securityContext: {privileged: true}}
            """, """
            apiVersion: apps/v1
            kind: Deployment
            metadata: {name: builder0, annotations: {buildx.docker.com/platform: linux/amd64}}
            spec:
              selector: {matchLabels: {app: builder0}}
              template:
                metadata: {labels: {app: builder0}, annotations: {buildx.docker.com/platform: linux/amd64}}
                spec:
                  initContainers:
                    - {name: qemu, image: tonistiigi/binfmt, securityContext: {privileged: true}}
                  containers:
                    - name: buildkitd
                      image: moby/buildkit:buildx-stable-1
                      readinessProbe: {exec: {command: [buildctl, debug, workers]}}
                      securityContext: {privileged: true}
                      volumeMounts: [{name: config, mountPath: /etc/buildkit}]
                  volumes: [{name: config, configMap: {name: builder0-config}}]
            """);

    @TempDir
    Path temp;

    private final List<Hook> started = new ArrayList<>();

    // ---- The patches, merged ---------------------------------------------------------------------------------------

    @ParameterizedTest(name = "sample {index}")
    @FieldSource("SAMPLES")
    void eachPatchMergesIntoTheManifestsThatPeopleHave(String sample) throws IOException {
        for (String patch : List.of("prestop.yaml", "baked.yaml")) {
            Files.writeString(temp.resolve("buildkitd.yaml"), sample);
            Files.writeString(temp.resolve(patch), DocsTest.saved(patch));
            String merged = kubectl("patch", "--local", "-f", temp.resolve("buildkitd.yaml").toString(),
                    "--patch-file", temp.resolve(patch).toString(), "-o", "yaml");
            assertMerged(merged, sample, DocsTest.saved(patch));
        }
    }

    @Test
    void kustomizeMergesThePatchAndMakesTheConfigMap() throws IOException {
        Files.copy(Hook.SCRIPT, temp.resolve(Hook.SCRIPT.getFileName()));
        Files.writeString(temp.resolve("buildkitd.yaml"), SAMPLES.get(0));
        Files.writeString(temp.resolve("prestop.yaml"),
                "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: any}\n" + DocsTest.saved("prestop.yaml"));
        Files.writeString(temp.resolve("kustomization.yaml"), DocsTest.blocks("yaml").stream().map(DocsTest.Block::text)
                .filter(text -> text.contains("configMapGenerator")).collect(Collectors.joining()));
        String[] made = kubectl("kustomize", temp.toString()).split("(?m)^---$");
        ConfigMap map = DocsTest.YAML.readValue(made[0], ConfigMap.class);
        assertThat(map.getData()).containsValue(DocsTest.read(Hook.SCRIPT));
        String hashed = map.getMetadata().getName(); // another script, another name: the pods are renewed
        assertThat(made[1]).contains("name: " + hashed);
        assertMerged(made[1].replace(hashed, "buildkit-prestop"), SAMPLES.get(0), DocsTest.saved("prestop.yaml"));
    }

    /** The patch is in it, and so is all of the manifest that the patch does not speak of. */
    private static void assertMerged(String result, String sample, String patch) throws IOException {
        JsonNode merged = DocsTest.YAML.readTree(result);
        ObjectNode target = (ObjectNode) DocsTest.YAML.readTree(sample);
        ObjectNode container = (ObjectNode) target.at("/spec/template/spec/containers/0");
        container.remove("readinessProbe"); // the patch's counts
        if (patch.contains(" image: registry.example.com/")) {
            container.remove("image");
        }
        assertThat(holds(merged, target)).as("%s%nis not whole in %s", target, merged).isTrue();
        assertThat(holds(merged, DocsTest.YAML.readTree(patch))).as("%s%nis not whole in %s", patch, merged).isTrue();

        PodTemplateSpec template = merged.path("kind").asText().equals("StatefulSet")
                ? DocsTest.YAML.treeToValue(merged, StatefulSet.class).getSpec().getTemplate()
                : DocsTest.YAML.treeToValue(merged, Deployment.class).getSpec().getTemplate();
        PodSpec pod = template.getSpec();
        assertThat(pod.getContainers()).extracting(Container::getName).containsExactly("buildkitd");
        assertThat(pod.getContainers().get(0).getReadinessProbe().getTcpSocket()).as("a second handler").isNull();
        Map<String, Volume> volumes = pod.getVolumes().stream().collect(Collectors.toMap(Volume::getName, v -> v));
        for (Container each : Stream.of(pod.getInitContainers(), pod.getContainers()).flatMap(List::stream).toList()) {
            for (VolumeMount mount : each.getVolumeMounts()) {
                assertThat(volumes).containsKey(mount.getName());
                assertThat(mount.getSubPath()).isIn(null, "buildkit-prestop.java"); // the key in configmap.yaml
            }
        }
        if (volumes.containsKey("prestop")) {
            assertThat(template.getMetadata().getAnnotations())
                    .containsEntry("cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes", "prestop");
        }
    }

    /** Whether the whole has all that the part has; in lists of objects in any place; null stands for nothing. */
    private static boolean holds(JsonNode whole, JsonNode part) {
        if (part.isObject()) {
            return part.properties().stream().allMatch(field -> holds(whole.path(field.getKey()), field.getValue()));
        }
        if (part.path(0).isObject()) {
            return part.valueStream().allMatch(item -> whole.valueStream().anyMatch(other -> holds(other, item)));
        }
        return part.isNull() ? whole.isMissingNode() || whole.isNull() : whole.equals(part);
    }

    private String kubectl(String... arguments) {
        List<String> command = new ArrayList<>(List.of(Tools.require("kubectl").toString()));
        command.addAll(List.of(arguments));
        try (Hook kubectl = Hook.run(command, Map.of("HOME", temp.toString()))) {
            assertThat(kubectl.exitCode()).as(String.join("\n", kubectl.err())).isZero();
            return String.join("\n", kubectl.out()) + "\n";
        }
    }

    // ---- The patches' commands, run --------------------------------------------------------------------------------

    /** What the commands call: each notes its arguments and Java's options, and ends as the file of its name says. */
    @BeforeEach
    void makeStubs() throws IOException {
        Files.createDirectories(temp.resolve("bin"));
        Files.createDirectories(temp.resolve("tmp"));
        Files.createDirectories(temp.resolve("prestop"));
        for (String stub : List.of("jbang", "java", "buildctl")) {
            answer(stub, 0);
            Tools.stub(temp.resolve("bin").resolve(stub), """
                    echo "%2$s $*$JAVA_TOOL_OPTIONS$JDK_JAVA_OPTIONS$_JAVA_OPTIONS" >>%1$s/calls
                    exit $(cat %1$s/%2$s)
                    """.formatted(temp, stub));
        }
        Tools.stub(temp.resolve("bin/sleep"), "exec /bin/sleep 0.1"); // who counts sleeps and not seconds ends early
    }

    @AfterEach
    void endAll() {
        started.forEach(Hook::close);
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void buildkitdOfWayOneWaitsUntilItsFileIsGone(String shell) throws IOException {
        Container buildkitd = DocsTest.pod("prestop.yaml").getContainers().get(0);
        List<String> ready = buildkitd.getReadinessProbe().getExec().getCommand();
        Hook quiet = run(shell, ready);
        assertThat(quiet.exitCode()).isZero();
        assertThat(quiet.err()).as("the kubelet shows it in an event").isEmpty();
        Hook wait = run(shell, buildkitd.getLifecycle().getPreStop().getExec().getCommand());
        Hook.waitUntil("it asks", () -> asks().size() == 1);
        assertThat(run(shell, ready).exitCode()).isNotZero();
        assertThat(wait.process().isAlive()).isTrue();
        Files.delete(asks().get(0));
        assertThat(wait.exitCode()).isZero();
        assertThat(temp.resolve("log")).doesNotExist();
        answer("buildctl", 1);
        assertThat(run(shell, ready).exitCode()).isNotZero();
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void buildkitdOfWayOneGivesUpByTheClockAndSaysSo(String shell) throws IOException {
        List<String> preStop = DocsTest.pod("prestop.yaml").getContainers().get(0).getLifecycle().getPreStop().getExec()
                .getCommand();
        for (boolean canAsk : new boolean[] {true, false}) {
            if (!canAsk) {
                Files.delete(asks().get(0));
                Files.delete(temp.resolve("prestop"));
            }
            Hook wait = run(shell, preStop, 3);
            assertThat(wait.exitCode()).isZero();
            assertThat(wait.age()).isBetween(Duration.ofSeconds(2), Duration.ofSeconds(20));
            assertThat(temp.resolve("log")).hasContent("The preStop hook gives up after 3 s.\n");
            Files.delete(temp.resolve("log"));
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void sidecarCompilesAndRemovesAFileOnlyWhenTheHookSaidThatAllIsQuiet(String shell) throws IOException {
        Container sidecar = DocsTest.pod("prestop.yaml").getInitContainers().get(0);
        List<String> started = sidecar.getStartupProbe().getExec().getCommand();
        answer("jbang", 3);
        assertThat(run(shell, sidecar.getCommand()).exitCode()).isEqualTo(3);
        assertThat(run(shell, started).exitCode()).isNotZero();
        answer("jbang", 0);
        run(shell, sidecar.getCommand());
        Hook.waitUntil("the startup probe passes", () -> run(shell, started).exitCode() == 0);
        answer("jbang", 1);
        Files.createFile(temp.resolve("prestop/ask.abcdef"));
        Files.createFile(temp.resolve("prestop/ask.ghijkl")); // after a failed liveness probe there may be two
        Hook.waitUntil("the hook is run again", () -> calls().size() >= 7);
        assertThat(asks()).hasSize(2);
        answer("jbang", 0);
        Hook.waitUntil("the files go", () -> asks().isEmpty());
        String script = "jbang /opt/prestop/buildkit-prestop.java";
        assertThat(calls().subList(0, 3)).containsExactly(script + " --version", script + " --version", script);
        assertThat(calls()).noneMatch(call -> call.contains("-Xbogus"));
    }

    @ParameterizedTest
    @CsvSource({"dash, java", "busybox ash, java", "dash, jbang", "busybox ash, jbang"})
    void imageWithTheHookWaitsUntilTheHookEndsWell(String shell, String stub) throws IOException {
        String hook = stub.equals("java") ? JAR : JBANG;
        assertThat(DocsTest.saved("baked.yaml").split(Pattern.quote(JAR), -1)).as("way 3 replaces it twice").hasSize(3);
        assertThat(DocsTest.README.replaceAll("\\s+", " ")).contains("write `" + JBANG + "` for `" + JAR + "`");
        Container buildkitd = DocsTest.YAML.readValue(DocsTest.saved("baked.yaml").replace(JAR, hook), Deployment.class)
                .getSpec().getTemplate().getSpec().getContainers().get(0);
        List<String> preStop = buildkitd.getLifecycle().getPreStop().getExec().getCommand();
        List<String> startup = buildkitd.getStartupProbe().getExec().getCommand();
        List<String> ready = buildkitd.getReadinessProbe().getExec().getCommand();

        answer(stub, 1);
        Hook wait = run(shell, preStop);
        Hook.waitUntil("the hook is run again", () -> calls().size() >= 2);
        assertThat(wait.process().isAlive()).isTrue();
        assertThat(run(shell, ready).exitCode()).isNotZero();
        assertThat(run(shell, startup).exitCode()).as("a hook that cannot run").isNotZero();
        answer(stub, 0);
        assertThat(wait.exitCode()).isZero();
        assertThat(calls().get(0)).matches(stub + " .* --max-wait-seconds 35(40|39)");
        assertThat(run(shell, startup).exitCode()).isZero();
        assertThat(run(shell, ready).exitCode()).as("ready after a restart").isZero();
        answer("buildctl", 1);
        assertThat(run(shell, startup).exitCode()).isNotZero();
        assertThat(run(shell, ready).exitCode()).isNotZero();

        answer(stub, 1);
        Hook hopeless = run(shell, preStop, 3);
        hopeless.exitCode();
        assertThat(hopeless.age()).isBetween(Duration.ofSeconds(2), Duration.ofSeconds(20));
        assertThat(calls()).noneMatch(call -> call.contains("-Xbogus"));
    }

    @ParameterizedTest
    @CsvSource({"dash, prestop.yaml", "busybox ash, prestop.yaml", "dash, baked.yaml", "busybox ash, baked.yaml"})
    void waitGoesOnWhenForAWhileNoProcessCanBeStarted(String shell, String patch) throws IOException {
        Tools.requireRoot();
        Tools.require("prlimit");
        for (String shared : List.of("", "tmp", "prestop")) {
            Files.setPosixFilePermissions(temp.resolve(shared), PosixFilePermissions.fromString("rwxrwxrwx"));
        }
        answer("java", 1);
        List<String> preStop = DocsTest.pod(patch).getContainers().get(0).getLifecycle().getPreStop().getExec()
                .getCommand();
        Hook wait = run("setpriv --reuid=64321 --clear-groups " + shell, preStop); // root would have no limit
        Hook.waitUntil("it waits", () -> asks().size() + calls().size() > 0);
        limitProcesses(wait, 0);
        Hook.pause(1000);
        limitProcesses(wait, 1000);
        assertThat(wait.process().isAlive()).isTrue();
        Path open = Path.of("/proc", String.valueOf(wait.process().pid()), "fd");
        assertThat(open.toFile().list()).as("no pipe is left of each try").hasSizeLessThan(20);
        answer("java", 0);
        for (Path ask : asks()) {
            Files.delete(ask);
        }
        assertThat(wait.exitCode()).isZero();
    }

    private static void limitProcesses(Hook hook, int count) {
        Hook prlimit = Hook.run(List.of("setpriv", "--reuid=64321", "--clear-groups", "prlimit",
                "--pid=" + hook.process().pid(), "--nproc=" + count + ":"), Map.of());
        assertThat(prlimit.exitCode()).as(prlimit.err().toString()).isZero();
    }

    @ParameterizedTest
    @CsvSource({"'', false", "0, false", "2, true"})
    void seeItWorkDeletesThePodOnlyWhenABuildRunsInIt(String builds, boolean deletes) {
        Tools.stub(temp.resolve("bin/kubectl"), """
                echo "kubectl $*" >>%1$s/calls
                case "$*" in
                    "get pod"*) echo pod/first && echo pod/second ;;
                    *--once) echo "%2$s" ;;
                esac
                """.formatted(temp, builds));
        String block = DocsTest.blocks("sh").stream().map(DocsTest.Block::text)
                .filter(text -> text.contains("kubectl delete")).findFirst().orElseThrow();
        assertThat(run("dash", List.of("sh", "-c", block)).exitCode()).isZero();
        assertThat(calls().stream().filter(call -> call.contains(" delete "))).hasSize(deletes ? 1 : 0)
                .allMatch(call -> call.equals("kubectl delete pod/first --wait=false"));
    }

    private Hook run(String shell, List<String> command) {
        return run(shell, command, 3540);
    }

    /** Starts a command of a patch in this shell. Its places are in temp, and its 3540 s are so many. */
    private Hook run(String shell, List<String> command, int limit) {
        List<String> moved = new ArrayList<>(command);
        moved.replaceAll(word -> Pattern.compile("/opt/prestop/bin/|/opt/prestop/|/prestop/|/tmp/|/proc/1/fd/2|3540")
                .matcher(word).replaceAll(place -> switch (place.group()) {
                    case "/opt/prestop/" -> place.group();
                    case "/opt/prestop/bin/" -> temp + "/bin/";
                    case "/proc/1/fd/2" -> temp + "/log";
                    case "3540" -> String.valueOf(limit);
                    default -> temp + place.group();
                }));
        if (moved.get(0).equals("sh")) {
            List<String> words = List.of(shell.split(" "));
            Tools.require(words.get(0));
            moved.remove(0);
            moved.addAll(0, words);
        }
        Hook hook = Hook.run(moved, Hook.env("PATH", temp.resolve("bin") + ":" + System.getenv("PATH"),
                "JAVA_TOOL_OPTIONS", "-Xbogus", "JDK_JAVA_OPTIONS", "-Xbogus", "_JAVA_OPTIONS", "-Xbogus",
                "ask", "/", "end", 1));
        started.add(hook);
        return hook;
    }

    /** Lets a stub end with this exit code from now on. */
    private void answer(String stub, int code) throws IOException {
        Path file = Files.writeString(temp.resolve(stub + ".new"), code + "\n");
        Files.move(file, temp.resolve(stub), StandardCopyOption.REPLACE_EXISTING);
    }

    /** The calls of the hook so far. */
    private List<String> calls() {
        return Files.notExists(temp.resolve("calls")) ? List.of() : DocsTest.read(temp.resolve("calls")).lines()
                .filter(line -> !line.startsWith("buildctl")).toList();
    }

    private List<Path> asks() {
        try (Stream<Path> files = Files.list(temp.resolve("prestop"))) {
            return files.toList();
        } catch (IOException e) {
            throw new java.io.UncheckedIOException(e);
        }
    }
}
