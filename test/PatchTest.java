import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Named.named;

import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import io.fabric8.kubernetes.api.model.*;
import java.io.IOException;
import java.nio.file.*;
import java.nio.file.attribute.PosixFilePermissions;
import java.util.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/** Merges the README's patches into manifests as people have them, and runs the commands of its Dockerfile and text. */
class PatchTest {

    /** The command of the image. */
    private static final String COMMAND =
            DocsTest.found("(?s)<<'EOF' /usr/local/bin/buildkit-prestop\n(.*?\n)EOF\n", DocsTest.README).get(0);
    /** BuildKit's example of a Deployment with TLS, shortened. */
    private static final String DEPLOYMENT = """
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
                      image: moby/buildkit:master
                      args: [--addr, "tcp://0.0.0.0:1234", --tlscert, /certs/cert.pem, --tlskey, /certs/key.pem]
                      env: [{name: TZ, value: UTC}]
                      readinessProbe: {exec: {command: [buildctl, debug, workers]}, periodSeconds: 30}
                      livenessProbe: {exec: {command: [buildctl, debug, workers]}, terminationGracePeriodSeconds: 300}
                      securityContext: {privileged: true}
                      volumeMounts: [{name: certs, mountPath: /certs, readOnly: true}]
                  volumes: [{name: certs, secret: {secretName: buildkit-daemon-certs}}]
            """;
    /** The same under other names, and with an init container and a preStop hook of another kind. */
    private static final String OF_OTHER_NAMES = DEPLOYMENT.replaceFirst("name: buildkitd", "name: builder0")
            .replace("- name: buildkitd", "- name: builder\n          lifecycle: {preStop: {sleep: {seconds: 5}}}")
            .replace("      containers:", "      initContainers: [{name: qemu, image: tonistiigi/binfmt}]\n"
                    + "      containers:");
    /** One that has no list which a patch adds to. */
    private static final String STATEFUL_SET = """
            apiVersion: apps/v1
            kind: StatefulSet
            metadata: {name: buildkitd}
            spec:
              podManagementPolicy: Parallel
              template: {spec: {containers: [{name: buildkitd, image: "moby/buildkit:master"}]}}
            """;

    @TempDir
    Path temp;

    private final List<Hook> started = new ArrayList<>();

    // ---- The patches, merged ---------------------------------------------------------------------------------------

    private static Stream<Named<String>> manifests() {
        return Stream.of(named("Deployment", DEPLOYMENT), named("Deployment of other names", OF_OTHER_NAMES),
                named("StatefulSet", STATEFUL_SET));
    }

    @ParameterizedTest
    @MethodSource("manifests")
    void eachPatchMergesWithKubectlAndWithKustomize(String manifest) throws IOException {
        JsonNode target = DocsTest.YAML.readTree(manifest);
        String kind = "kind: " + target.path("kind").asText();
        String name = "name: " + target.at("/metadata/name").asText();
        String container = "- name: " + target.at("/spec/template/spec/containers/0/name").asText();
        String kustomization = DocsTest.block("yaml", "configMapGenerator")
                .replace("{kind: Deployment, name: buildkitd}", "{" + kind + ", " + name + "}");
        Files.copy(Hook.SCRIPT, temp.resolve(Hook.SCRIPT.getFileName()));
        Files.writeString(temp.resolve("buildkitd.yaml"), manifest);
        for (String file : List.of("prestop.yaml", "baked.yaml")) {
            String patch = DocsTest.saved(file).replaceFirst("^kind: Deployment", kind)
                    .replace("metadata: {name: buildkitd}", "metadata: {" + name + "}")
                    .replace("- name: buildkitd", container);
            assertMerged(patched(manifest, patch, "yaml"), manifest, patch);

            Files.writeString(temp.resolve(file), patch);
            Files.writeString(temp.resolve("kustomization.yaml"), kustomization.replace("prestop.yaml", file));
            String[] made = kubectl("kustomize", temp.toString()).split("(?m)^---$");
            ConfigMap map = DocsTest.YAML.readValue(made[0], ConfigMap.class);
            assertThat(map.getData()).containsValue(DocsTest.read(Hook.SCRIPT));
            String hashed = map.getMetadata().getName(); // another script, another name: the pods are renewed
            assertThat(made[1].contains("name: " + hashed)).isEqualTo(file.equals("prestop.yaml"));
            assertMerged(made[1].replace(hashed, "buildkit-prestop"), manifest, patch);
        }
    }

    @Test
    void readmesCommandShowsGracePeriodAndHookAndAContainerTooMany() throws IOException {
        String sidecar = DocsTest.saved("prestop.yaml");
        String baked = DocsTest.saved("baked.yaml");
        assertThat(shown(DEPLOYMENT, baked)).isEqualTo(
                "3600 buildkitd {\"exec\":{\"command\":[\"buildkit-prestop\"]}}");
        assertThat(shown(DEPLOYMENT, sidecar)).startsWith("3600 prestop buildkitd {");
        assertThat(shown(OF_OTHER_NAMES, baked)).startsWith("3600 qemu buildkitd builder {");
        assertThat(shown(DEPLOYMENT, "spec: {replicas: 1}")).isEqualTo("buildkitd");
        assertThat(patched(OF_OTHER_NAMES, sidecar, "jsonpath={..containers[*].image}"))
                .as("the API refuses a container without an image").isEqualTo("moby/buildkit:master\n");
    }

    /** What the README's command prints of the patched manifest. */
    private String shown(String manifest, String patch) throws IOException {
        String template = DocsTest.found("(jsonpath='[^']*)", DocsTest.README).get(0).replace("'", "");
        return patched(manifest, patch, template).strip().replaceAll("\\s+", " ");
    }

    /** The patch is in it, and so is all of the manifest but what the patch replaces. */
    private static void assertMerged(String result, String manifest, String patch) throws IOException {
        JsonNode merged = DocsTest.YAML.readTree(result);
        JsonNode target = DocsTest.YAML.readTree(manifest);
        JsonNode added = DocsTest.YAML.readTree(patch);
        boolean bringsImage = patch.contains(" image: registry.example.com/");
        container(target).remove(bringsImage ? List.of("lifecycle", "image") : List.of("lifecycle"));
        assertThat(holds(merged, target)).as("%s%nis not whole in %s", target, merged).isTrue();
        assertThat(holds(merged, added)).as("%s%nis not whole in %s", patch, merged).isTrue();
        assertThat(container(added).fieldNames()).toIterable().as("the patch speaks of no probe, and of little else")
                .isSubsetOf("name", "image", "env", "lifecycle", "volumeMounts");

        PodSpec pod = DocsTest.podOf(result);
        assertThat(pod.getContainers()).hasSize(1);
        assertThat(pod.getContainers().get(0).getLifecycle().getPreStop().getSleep()).as("a second handler").isNull();
        assertThat(pod.getInitContainers()).extracting(Container::getName).isEqualTo(Stream.of(patch, manifest)
                .flatMap(each -> DocsTest.podOf(each).getInitContainers().stream()).map(Container::getName).toList());
        assertThat(pod.getVolumes()).extracting(Volume::getName)
                .containsAll(Stream.of(pod.getInitContainers(), pod.getContainers()).flatMap(List::stream)
                        .flatMap(each -> each.getVolumeMounts().stream()).map(VolumeMount::getName).toList());
    }

    private static ObjectNode container(JsonNode manifest) {
        return (ObjectNode) manifest.at("/spec/template/spec/containers/0");
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

    private String patched(String manifest, String patch, String output) throws IOException {
        Path before = Files.writeString(temp.resolve("manifest.yaml"), manifest);
        Path file = Files.writeString(temp.resolve("patch.yaml"), patch);
        return kubectl("patch", "--local", "-f", before.toString(), "--patch-file", file.toString(), "-o", output);
    }

    private String kubectl(String... arguments) {
        List<String> command = new ArrayList<>(List.of(Tools.require("kubectl").toString()));
        command.addAll(List.of(arguments));
        try (Hook kubectl = Hook.run(command, Map.of("HOME", temp.toString()))) {
            assertThat(kubectl.exitCode()).as(String.join("\n", kubectl.err())).isZero();
            return String.join("\n", kubectl.out()) + "\n";
        }
    }

    // ---- The command buildkit-prestop of the Dockerfile, run -------------------------------------------------------

    /** What the command calls: it notes its arguments and Java's options, and ends as the file "code" says. */
    @BeforeEach
    void makeStubs() throws IOException {
        Files.createDirectories(temp.resolve("bin"));
        exitWith(0);
        for (String stub : List.of("java", "jbang")) {
            Tools.stub(temp.resolve("bin").resolve(stub), """
                    echo "%2$s $*$JAVA_TOOL_OPTIONS$JDK_JAVA_OPTIONS$_JAVA_OPTIONS" >>%1$s/calls
                    echo "said by %2$s" >&2
                    read code <%1$s/code
                    exit $code
                    """.formatted(temp, stub));
        }
        Tools.stub(temp.resolve("bin/sleep"), "exec /bin/sleep 0.1");
    }

    @AfterEach
    void endAll() {
        started.forEach(Hook::close);
    }

    @ParameterizedTest
    @CsvSource({"dash, 0", "dash, 124", "busybox ash, 0", "busybox ash, 124"})
    void hookThatCannotBeStartedOrCrashesIsStartedAgainUntilItsWaitIsOver(String shell, int end) throws IOException {
        Path java = temp.resolve("bin/java");
        Path gone = Files.move(java, temp.resolve("bin/gone"));
        exitWith(1);
        Hook wait = start(shell, COMMAND);
        Hook.pause(1000);
        assertThat(wait.process().isAlive()).isTrue();
        Files.move(gone, java);
        Hook.waitUntil("the hook is started again", () -> calls().size() >= 3);
        exitWith(end);
        assertThat(wait.exitCode()).isEqualTo(end);
        assertThat(calls()).containsOnly("java -jar /opt/prestop/hook.jar");
        assertThat(wait.err()).as("what the hook says is seen").contains("said by java");
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void hookWithArgumentsIsRunOnceThoughItFails(String shell) throws IOException {
        exitWith(1);
        assertThat(start(shell, COMMAND, "--once", "--log-prefix=a  b").exitCode()).isEqualTo(1);
        assertThat(calls()).containsExactly("java -jar /opt/prestop/hook.jar --once --log-prefix=a  b");
    }

    @ParameterizedTest
    @ValueSource(strings = {"dash", "busybox ash"})
    void waitGoesOnWhileNoProcessCanBeStarted(String shell) throws IOException {
        Tools.requireRoot();
        Tools.require("prlimit");
        Files.setPosixFilePermissions(temp, PosixFilePermissions.fromString("rwxrwxrwx"));
        exitWith(1);
        Hook wait = start("setpriv --reuid=64321 --clear-groups " + shell, COMMAND); // root would have no limit
        Hook.waitUntil("it waits", () -> !calls().isEmpty());
        limitProcesses(wait, 0);
        Hook.pause(1000);
        limitProcesses(wait, 1000);
        assertThat(wait.process().isAlive()).isTrue();
        assertThat(wait.err()).as("no thousands of complaints").containsOnly("said by java");
        Path open = Path.of("/proc", String.valueOf(wait.process().pid()), "fd");
        assertThat(open.toFile().list()).as("no pipe is left of each try").hasSizeLessThan(20);
        exitWith(0);
        assertThat(wait.exitCode()).isZero();
    }

    @Test
    void imageWithJBangRunsTheScriptUnderTheSameName() throws IOException {
        String edit = DocsTest.found("sed -i \\\\\n *'(.*)' \\\\\n */usr/local/bin/buildkit-prestop\n", DocsTest.README)
                .get(0);
        Path before = Files.writeString(temp.resolve("before"), COMMAND);
        Hook sed = Hook.run(List.of("sed", edit, before.toString()), Map.of());
        assertThat(sed.exitCode()).isZero();
        assertThat(start("dash", String.join("\n", sed.out()), "--once").exitCode()).isZero();
        assertThat(calls()).containsExactly("jbang --offline /opt/prestop/buildkit-prestop.java --once");
    }

    private static void limitProcesses(Hook hook, int count) {
        Hook prlimit = Hook.run(List.of("setpriv", "--reuid=64321", "--clear-groups", "prlimit",
                "--pid=" + hook.process().pid(), "--nproc=" + count + ":"), Map.of());
        assertThat(prlimit.exitCode()).as(prlimit.err().toString()).isZero();
    }

    // ---- See it work -----------------------------------------------------------------------------------------------

    @ParameterizedTest
    @CsvSource({"'', false", "0, false", "2, true"})
    void seeItWorkDeletesThePodOnlyWhenABuildRunsInIt(String builds, boolean deletes) throws IOException {
        Tools.stub(temp.resolve("bin/kubectl"), """
                echo "kubectl $*" >>%1$s/calls
                case "$*" in
                    "get pod"*) echo pod/first && echo pod/second ;;
                    *--once) echo "%2$s" ;;
                esac
                """.formatted(temp, builds));
        Hook shell = start("dash", DocsTest.block("sh", "kubectl delete"));
        assertThat(shell.exitCode() == 0).isEqualTo(deletes);
        assertThat(calls()).filteredOn(call -> call.contains(" delete "))
                .isEqualTo(deletes ? List.of("kubectl delete pod/first --wait=false") : List.of());
    }

    // ---- Running ---------------------------------------------------------------------------------------------------

    /** Runs a script that calls the stubs. */
    private Hook start(String shell, String script, String... arguments) throws IOException {
        Path file = Files.writeString(temp.resolve("script"),
                script.replaceAll("/opt/(prestop|jbang)/bin/", temp + "/bin/"));
        List<String> command = new ArrayList<>(List.of(shell.split(" ")));
        command.stream().filter(word -> !word.startsWith("--") && !word.equals("ash")).forEach(Tools::require);
        command.add(file.toString());
        command.addAll(List.of(arguments));
        Hook hook = Hook.run(command, Hook.env("PATH", temp.resolve("bin") + ":" + System.getenv("PATH"),
                "JAVA_TOOL_OPTIONS", "-Xbogus", "JDK_JAVA_OPTIONS", "-Xbogus", "_JAVA_OPTIONS", "-Xbogus"));
        started.add(hook);
        return hook;
    }

    /** Lets the hook end with this exit code from now on. */
    private void exitWith(int code) throws IOException {
        Path file = Files.writeString(temp.resolve("code.new"), code + "\n");
        Files.move(file, temp.resolve("code"), StandardCopyOption.REPLACE_EXISTING);
    }

    /** The calls of the stubs so far. */
    private List<String> calls() {
        Path calls = temp.resolve("calls");
        return Files.notExists(calls) ? List.of() : DocsTest.read(calls).lines().toList();
    }
}
